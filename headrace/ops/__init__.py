"""WHAT is computed: one file per operation, each with its reference, checks, traffic and kernels."""
