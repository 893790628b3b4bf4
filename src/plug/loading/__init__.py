"""Models from files to devices and back: load, save, memory, transfer, layers kept elsewhere."""
