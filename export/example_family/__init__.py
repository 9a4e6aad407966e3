"""The recipe of the example model family: corpus, targets, draft, controls, and evaluation."""
