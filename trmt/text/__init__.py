"""Text: where it comes from, what is left out of it, how it is cut into pieces."""
