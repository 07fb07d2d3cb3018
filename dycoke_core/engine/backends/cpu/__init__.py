"""The CPU backend: slabs per sequence, compact copies of the kept rows, PyTorch's fused kernels."""
