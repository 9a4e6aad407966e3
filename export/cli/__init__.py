"""`draft-export`: the command line, one module per command. `main` is the entry point."""

from export.cli.main import main

__all__ = ["main"]
