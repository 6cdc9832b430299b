"""Analysis of models and runs: word alignment, attention maps, training curves, comparisons."""
