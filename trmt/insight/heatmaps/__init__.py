"""Attention drawn: as text, as a picture, as a page to walk through."""
