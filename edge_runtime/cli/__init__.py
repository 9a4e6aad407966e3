"""`edge-runtime`: the command line, one module per command. `main` is the entry point."""

from edge_runtime.cli.main import main

__all__ = ["main"]
