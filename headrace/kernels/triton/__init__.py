"""Portable GPU kernels, for NVIDIA and AMD: one file per op, imported when one is first launched."""
