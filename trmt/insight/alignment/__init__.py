"""Word alignment: by a network's attention or by IBM Model 1, in one direction or symmetrised."""
