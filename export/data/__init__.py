"""Text of the example family and of drafts: corpora, tokenizer, and token streams."""
