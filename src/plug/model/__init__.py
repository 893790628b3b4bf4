"""Plain PyTorch: the mathematics of PLUG on one device."""
