"""Shows verified tokens as text, as they come, told apart by where they come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from tokenizers import Tokenizer

from edge_runtime.decoding.detokenizer import Detokeniser
from edge_runtime.decoding.generation import Piece

ACCEPTED = "\x1b[32m"  # green: the board drafted it and the target agreed
OWN = "\x1b[33m"  # yellow: the target said it itself
UNVERIFIED = "\x1b[31;4m"  # red and underlined: the draft alone
PROMPT = "\x1b[2m"
RESET = "\x1b[0m"

LEGEND = ("drafted on the board and accepted", "the target's own")


class TextStream:
    """Writes pieces to a stream; characters that span tokens come out when they are complete.

    Args:
        colour: None for yes on a terminal, unless NO_COLOR is set.
    """

    def __init__(self, tokenizer: Tokenizer, stream: TextIO, colour: bool | None = None) -> None:
        self._stream = stream
        self._text = Detokeniser(tokenizer)
        self._colour = stream.isatty() and "NO_COLOR" not in os.environ if colour is None else colour

    def prompt(self, text: str) -> None:
        """Writes what the text continues."""
        self._write(text, PROMPT)

    def legend(self) -> None:
        """Writes what the colours mean, where there are colours."""
        if self._colour:
            self._write(f"{ACCEPTED}{LEGEND[0]}{RESET}, {OWN}{LEGEND[1]}{RESET}\n", "")

    def piece(self, piece: Piece) -> None:
        """Writes verified tokens."""
        for ids, colour in ((piece.accepted, ACCEPTED), (piece.own, OWN)):
            self._write("".join(map(self._text.step, ids)), colour)

    def end(self, unverified: Sequence[int] = ()) -> None:
        """Ends the line, behind what the draft alone says comes last; that is marked without colours, too."""
        tail = "".join(self._text.behind(list(unverified)))
        if tail:
            self._write(tail if self._colour else f"[unverified: {tail}]", UNVERIFIED)
        self._write("\n", "")

    def _write(self, text: str, colour: str) -> None:
        if text:
            self._stream.write(f"{colour}{text}{RESET}" if colour and self._colour else text)
            self._stream.flush()
