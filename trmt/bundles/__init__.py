"""Networks as folders: bundles, checkpoints, int8 matrices."""
