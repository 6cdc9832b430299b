"""Networks as folders: bundles, checkpoints, and what lies in them."""
