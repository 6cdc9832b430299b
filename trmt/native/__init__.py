"""Faster versions of what the core computes in plain PyTorch: C kernels for CPUs, Triton kernels for GPUs."""
