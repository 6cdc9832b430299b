"""Attention maps: extracted from a network, and drawn as text, as a figure or as an HTML page."""
