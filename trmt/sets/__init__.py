"""Prepared sets of encoded text, and the batches made from them."""
