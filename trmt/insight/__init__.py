"""What a network does, shown: word alignments, attention, curves, comparisons."""
