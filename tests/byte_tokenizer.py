"""The tokenizer of tests' random models, for tests that need no model."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY_SIZE = 300


def byte_tokenizer() -> Tokenizer:
    """One token per byte, `<|endoftext|>` as id 0, and unused ids up to VOCABULARY_SIZE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", *alphabet]
    names += [f"<|unused{index}|>" for index in range(VOCABULARY_SIZE - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
