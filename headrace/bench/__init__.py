"""Measure headrace, its peers and the machine."""
