"""Cost of verification; see `__main__`."""
