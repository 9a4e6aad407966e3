"""`cloud-verifier`: the command line, one module per command. `main` is the entry point."""

from cloud_verifier.cli.main import main

__all__ = ["main"]
