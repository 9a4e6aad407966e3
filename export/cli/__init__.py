"""`draft-export`: the command line, one module per command."""

from export.cli.main import main

__all__ = ["main"]
