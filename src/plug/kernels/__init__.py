"""Kernels of the CUDA path; imported only where a CUDA device is in use, and by their tests."""
