"""Translation and preparation of large corpora by several processes or machines."""
