"""The pool: keys and values of all texts in pages, taken from a bounded stock and given back.

On an accelerator the stock is one allocation made at start, and a page holds few tokens, so that little of it lies
idle. On a CPU pages are made when they are first needed, and are so large that most texts have one: a text's keys are
then a view, and memory far behind its tokens costs nothing. There the sessions' store sets the bound.
Pages belong to the engine's thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PAGE = {"cuda": 64, "cpu": 512}
# Pages beyond what the texts' tokens need: a round's drafts and siblings stand in the cache until it is decided.
SLACK = 64
# Of a page on a CPU so many tokens' memory is taken when it is made: what a verifier holds then depends on how many
# sessions it has had at once, and does not creep up with every text that is a little longer.
TOUCHED = 96


def page_of(device: str) -> int:
    """Tokens by which a text's memory grows there: on a CPU it is taken as it is written to."""
    return 1 if torch.device(device).type == "cpu" else PAGE["cuda"]


class PoolFull(Exception):
    """No page is left."""


class Shape(NamedTuple):
    """What of a model its keys and values depend on."""

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: torch.nn.Module, shards: int = 1) -> Shape:
        """The shape of a transformers model's keys and values, or of one of so many shards of them."""
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, heads // shards, size, model.dtype, model.device)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.size * self.dtype.itemsize


class Text:
    """What the pool holds of one text: `length` tokens in `pages`, the last of them not full."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.length = 0


class Pool:
    """Pages of keys and values.

    Args:
        tokens: capacity on an accelerator, rounded up to whole pages.

    Attributes:
        page: tokens in a page.
        slabs: (pages, layers, 2, heads, page, size) each: keys and values. One where the device is an accelerator,
            else one for every page in use so far.
    """

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.shape = shape
        self.page = PAGE.get(shape.device.type, PAGE["cuda"])
        self._at_once = shape.device.type != "cpu"
        self.pages = -(-tokens // self.page) + SLACK
        self._free: list[int] = []
        self._moves: list[tuple[int, int, int, int]] = []
        self.slabs: list[torch.Tensor] = []
        if self._at_once:
            # One more, of which nobody reads: rows that only fill a batch are written there.
            self.slabs.append(self._slab(self.pages + 1))
            self._free = list(range(self.pages, 0, -1))

    def _slab(self, pages: int) -> torch.Tensor:
        shape = self.shape
        size = (pages, shape.layers, 2, shape.heads, self.page, shape.size)
        slab = torch.empty(size, dtype=shape.dtype, device=shape.device)
        if not self._at_once:
            slab[..., :TOUCHED, :] = 0
        return slab

    @property
    def used(self) -> int:
        """Pages that texts hold."""
        return (self.pages if self._at_once else len(self.slabs)) - len(self._free)

    def reserve(self, text: Text, length: int) -> None:
        """Gives `text` pages for `length` tokens. Raises PoolFull and changes nothing where there are too few."""
        wanted = -(-length // self.page) - len(text.pages)
        if self._at_once and wanted > len(self._free):
            raise PoolFull
        for _ in range(wanted):
            if not self._free:
                self.slabs.append(self._slab(1))
                self._free.append(len(self.slabs) - 1)
            text.pages.append(self._free.pop())

    def release(self, text: Text) -> None:
        """Takes all pages of `text` back; it is empty then."""
        self._free += reversed(text.pages)
        text.pages, text.length = [], 0

    def view(self, page: int) -> torch.Tensor:
        """(layers, 2, heads, page, size) of one page."""
        return self.slabs[0][page] if self._at_once else self.slabs[page][0]

    def keep(self, text: Text, rows: list[int]) -> None:
        """Rolls back: of the rows that were written behind `text`, the given ones stay, in ascending order.

        They move up to where the text ended before the next forward; the text is that much longer at once.
        """
        for index, row in enumerate(rows):
            if row != index:
                self._moves.append((*self._place(text, text.length + row), *self._place(text, text.length + index)))
        text.length += len(rows)

    def moves(self) -> list[tuple[int, int, int, int]]:
        """What is to be moved before the next forward: page and row, to page and row. Whoever asks has to do it."""
        moves, self._moves = self._moves, []
        return moves

    @torch.inference_mode()
    def settle(self) -> None:
        """Moves what `keep` has not moved yet. On a CPU only."""
        # In order: a row moves to one that has been read already, if it was to be read at all.
        for from_page, from_row, to_page, to_row in self.moves():
            self.view(to_page)[..., to_row, :] = self.view(from_page)[..., from_row, :]

    def _place(self, text: Text, position: int) -> tuple[int, int]:
        return text.pages[position // self.page], position % self.page
