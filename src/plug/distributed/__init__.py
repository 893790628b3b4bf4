"""More than one process or device."""
