"""The device to compute on: its choice, its memory, and transfers between it and the host."""
