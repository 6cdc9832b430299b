"""How translations are searched for."""
