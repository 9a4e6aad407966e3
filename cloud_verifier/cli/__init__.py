"""`cloud-verifier`: the command line, one module per command; `main.main` is the entry point."""
