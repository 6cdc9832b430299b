"""How each engine is told to translate; every module here runs in a process of its own."""
