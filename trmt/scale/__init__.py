"""Work cut into parts, for several processes or machines."""
