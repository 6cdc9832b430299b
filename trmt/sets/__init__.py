"""Prepared sets: shards of ids, and the batches that are made from them."""
