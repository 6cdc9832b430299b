"""What a network is trained for, one file each."""
