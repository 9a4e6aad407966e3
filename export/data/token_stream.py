"""Tokenized text: one stream of ids, held in memory as one tensor, from which batches are cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError

TokenIds = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
TOKENIZER_BATCH_DOCUMENTS = 256
# Separates documents in one text file.
DOCUMENT_SEPARATOR = "\f"


def tokenize_texts(tokenizer: Tokenizer, texts: Iterable[str], *, end_id: int) -> TokenIds:
    """Return all texts as one stream, shape (tokens,); `end_id` follows each text.

    The dtype is uint16 if the vocabulary fits, otherwise uint32.
    """
    chunks: list[npt.NDArray[Any]] = []
    dtype: type[np.uint16 | np.uint32] = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    remaining = iter(texts)
    while batch := list(islice(remaining, TOKENIZER_BATCH_DOCUMENTS)):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        chunks += (np.array([*encoding.ids, end_id], dtype=dtype) for encoding in encodings)
    chunks.append(np.empty(0, dtype=dtype))
    stream: TokenIds = np.concatenate(chunks)
    return stream


@dataclass(frozen=True)
class TokenStream:
    """Tokens on the training device, int32, shape (tokens,)."""

    ids: torch.Tensor

    @classmethod
    def from_ids(cls, ids: TokenIds, device: torch.device) -> TokenStream:
        """Copy `ids` to `device`."""
        return cls(torch.from_numpy(ids.astype(np.int32)).to(device))

    def random_windows(self, rows: int, length: int, random: np.random.Generator) -> torch.Tensor:
        """Return `rows` windows at random offsets, int64, shape (rows, length); they may span documents.

        Raises:
            InputError: the stream is shorter than `length`.
        """
        last = len(self.ids) - length
        if last < 0:
            raise InputError(f"a stream of {len(self.ids)} tokens holds no window of {length}: provide more text")
        starts = torch.from_numpy(random.integers(0, last + 1, rows)).to(self.ids.device)
        offsets = torch.arange(length, device=self.ids.device)
        return self.ids[starts[:, None] + offsets].long()

    def consecutive_windows(self, length: int) -> torch.Tensor:
        """Return the stream as adjacent windows, int64, shape (windows, length); an incomplete last one is dropped."""
        count = len(self.ids) // length
        return self.ids[: count * length].view(count, length).long()


@dataclass(frozen=True)
class MixedStream:
    """Several streams with fixed shares of every batch.

    Attributes:
        parts: streams with their weights, which need not add up to 1.
    """

    parts: tuple[tuple[TokenStream, float], ...]

    def random_windows(self, rows: int, length: int, random: np.random.Generator) -> torch.Tensor:
        """Return windows of all parts, int64, shape (rows, length)."""
        # Rounding the cumulative sum rather than each share makes the counts add up to `rows`.
        shares = np.cumsum([share for _, share in self.parts])
        edges = np.rint(rows * shares / shares[-1]).astype(int)
        counts = np.diff(edges, prepend=0)
        return torch.cat(
            [
                stream.random_windows(count, length, random)
                for (stream, _), count in zip(self.parts, counts, strict=True)
            ]
        )
