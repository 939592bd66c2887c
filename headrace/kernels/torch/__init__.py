"""PyTorch's own kernels as candidates of the same choice: one file per op, imported when one is first run."""
