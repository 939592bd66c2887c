"""Kernels in NumPy, for ops without native ones: they run everywhere, correctly, and are not fast."""
