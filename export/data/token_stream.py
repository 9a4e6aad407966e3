"""Tokenised text: one long uint16 stream per domain and split, on disk as xz and in memory as one tensor."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError
from export.data.tokenizer import END_OF_TEXT_ID

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
DOCUMENTS_AT_ONCE = 256


def tokenise(tokenizer: Tokenizer, texts: Iterable[str], *, end_id: int = END_OF_TEXT_ID) -> Ids:
    """All texts as one stream, each followed by the end-of-text id; shape (tokens,)."""
    pieces: list[Ids] = []
    kind = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    remaining = iter(texts)
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        pieces += (np.array([*encoding.ids, end_id], dtype=kind) for encoding in encodings)
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=kind)


def write_ids(path: Path, ids: Ids) -> None:
    """Writes a stream as xz of raw little-endian uint16: a third of its size, and text compresses no better."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with lzma.open(partial, "wb", preset=6) as file:
        file.write(ids.astype("<u2").tobytes())
    partial.replace(path)


def read_ids(path: Path) -> Ids:
    """Reads a stream that `write_ids` wrote.

    Raises:
        InputError: the file is not there or was cut short.
    """
    try:
        with lzma.open(path, "rb") as file:
            return np.frombuffer(file.read(), dtype="<u2").astype(np.uint16)
    except FileNotFoundError:
        raise InputError(f"no token stream at {path}: run `draft-export family --stage corpus` first") from None
    except (EOFError, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path} is not a whole token stream ({error}): make or copy it again") from None


@dataclass(frozen=True)
class TokenStream:
    """Tokens on the device that trains, int32, shape (tokens,)."""

    ids: torch.Tensor

    @classmethod
    def of(cls, ids: Ids, device: torch.device) -> TokenStream:
        """The stream `ids` on `device`."""
        return cls(torch.from_numpy(ids.astype(np.int32)).to(device))

    def windows(self, rows: int, length: int, random: np.random.Generator) -> torch.Tensor:
        """`rows` windows from random places, int64, shape (rows, length); they may span documents."""
        last = len(self.ids) - length
        if last < 0:
            raise InputError(f"a stream of {len(self.ids)} tokens holds no window of {length}: gather more text")
        starts = torch.from_numpy(random.integers(0, last + 1, rows)).to(self.ids.device)
        offsets = torch.arange(length, device=self.ids.device)
        return self.ids[starts[:, None] + offsets].long()

    def consecutive(self, rows: int, length: int) -> Iterator[torch.Tensor]:
        """Batches of adjacent windows from the start on, int64, shape (at most rows, length), the rest dropped."""
        whole = len(self.ids) // length
        for batch in self.ids[: whole * length].view(whole, length).split(rows):
            yield batch.long()


@dataclass(frozen=True)
class Mixture:
    """Several streams, drawn from in fixed shares, so that every batch has every kind of text."""

    parts: tuple[tuple[TokenStream, float], ...]

    def windows(self, rows: int, length: int, random: np.random.Generator) -> torch.Tensor:
        """Windows of all parts, int64, shape (rows, length)."""
        # Rounding the running sum, not each share, makes the counts add up to `rows`.
        shares = np.cumsum([share for _, share in self.parts])
        edges = np.rint(rows * shares / shares[-1]).astype(int)
        counts = np.diff(edges, prepend=0)
        return torch.cat(
            [stream.windows(count, length, random) for (stream, _), count in zip(self.parts, counts, strict=True)]
        )
