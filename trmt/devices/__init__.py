"""The device to compute on: which one, how much memory it has, how values get there and back."""
