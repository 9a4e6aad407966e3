"""A toy family for tests and benchmarks: models of 2.8M parameters that write Python, made by `make.py`."""

from pathlib import Path

# target-v1; target-v2 and target-v3, adapters for C++ and for type stubs; target-v4, with one block trained in full;
# draft-anchor, and its bundle.
FAMILY = Path(__file__).resolve().parent
VOCABULARY_SIZE = 2048
