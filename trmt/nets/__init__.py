"""Networks: their contracts, the layers they share, and one file for each."""
