"""`edge-runtime`: the command line, one module per command; `main.main` is the entry point."""
