"""Weights in 8 and 4 bits, and the fastest product with a weight that a device has."""
