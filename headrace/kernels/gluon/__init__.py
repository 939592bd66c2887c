"""GPU kernels written for one generation of chips, in Gluon: Hopper first."""
