"""The tokenizer of the toy family: byte-level BPE, saved as a regular Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from edge_runtime.protocol.errors import InputError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
END_OF_TEXT_ID = 0
PADDING_ID = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Train a vocabulary of exactly `size` tokens, special tokens included.

    Digits are split one by one, so that a small vocabulary spends no entries on numbers.

    Raises:
        InputError: the texts contain too few distinct pairs to fill the vocabulary.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise InputError(
            f"the texts fill only {tokenizer.get_vocab_size()} of {size} vocabulary entries: "
            "provide more text or choose a smaller vocabulary"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, *, context: int) -> None:
    """Write `tokenizer` so that both AutoTokenizer and the `tokenizers` library read it.

    The files are not written by transformers, because release 5 stores a tokenizer class that release 4 cannot load.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "unk_token": END_OF_TEXT,
    }
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
