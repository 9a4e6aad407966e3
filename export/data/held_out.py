"""Text that drafts are measured on: given files, or the files that no member of the example family was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError
from export.data.corpus import DOMAINS, gather

# Characters of a text that are looked at; a piece is wanted here and there, not all of it.
MOST_CHARACTERS = 4_000_000


def held_out(files: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Documents by the name of the text: each of `files`, or without any the family's held-out ones by domain.

    Raises:
        InputError: a file cannot be read, two have one name, or nothing of a domain is installed.
    """
    if not files:
        return {domain.name: [d.text for d in gather(domain).documents if d.held_out] for domain in DOMAINS}
    texts: dict[str, list[str]] = {}
    for path in files:
        if path.name in texts:
            raise InputError(f"two texts are called {path.name}: rename one, or put them into one file")
        try:
            texts[path.name] = [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --text {path}: {error}") from None
    return texts


def encoded(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """The ids of each document, without special tokens, up to MOST_CHARACTERS in all."""
    some, left = [], MOST_CHARACTERS
    for document in documents:
        if left <= 0:
            break
        some.append(document[:left])
        left -= len(document)
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False)]
