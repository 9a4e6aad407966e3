"""Loads evaluation text: given files, or the files that no member of the example family was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError
from export.data.corpus import DOMAINS, gather_corpus

# Chosen: evaluations sample a few pieces of a text, so that tokenizing more only costs time.
MAX_CHARACTERS = 4_000_000


def load_held_out(files: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Return documents by text name: one text per file, or without `files` the held-out corpus by domain.

    Raises:
        InputError: a file cannot be read, two files have the same name, or no package of a domain is installed.
    """
    if not files:
        return {domain.name: [d.text for d in gather_corpus(domain).documents if d.held_out] for domain in DOMAINS}
    texts: dict[str, list[str]] = {}
    for path in files:
        if path.name in texts:
            raise InputError(f"two texts are named {path.name}: rename one, or merge them into one file")
        try:
            texts[path.name] = [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --text {path}: {error}") from None
    return texts


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each document, without special tokens, up to MAX_CHARACTERS in total."""
    selected, left = [], MAX_CHARACTERS
    for document in documents:
        if left <= 0:
            break
        selected.append(document[:left])
        left -= len(document)
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(selected, add_special_tokens=False)]
