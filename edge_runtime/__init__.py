"""Everything that runs on the board. Never imports torch, transformers or optimum."""
