"""Writes a generated text to a terminal as its tokens arrive, colored by origin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from tokenizers import Tokenizer

from edge_runtime.common.terminal import escape
from edge_runtime.decoding import Detokenizer, VerifiedTokens
from edge_runtime.service.monitoring.words import load_words
from edge_runtime.service.stop_strings import StopStringFilter

ACCEPTED = "\x1b[32m"  # green
OWN = "\x1b[33m"  # yellow
UNVERIFIED = "\x1b[31;4m"  # red and underlined
PROMPT = "\x1b[2m"
RESET = "\x1b[0m"

COLORS = {"accepted": ACCEPTED, "own": OWN, "unverified": UNVERIFIED}


class TextStream:
    """Writes tokens to a stream as text. A character that spans tokens is written when it is complete.

    Args:
        color: whether to use colors; None uses them on a terminal, unless NO_COLOR is set.
        prompt: ids that the text continues.
        stop_strings, stop_ids: the text ends before the first of these.

    Attributes:
        text: the verified text so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stream: TextIO,
        color: bool | None = None,
        *,
        prompt: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.text = ""
        self._stream = stream
        self._detokenizer = Detokenizer(tokenizer, prompt, hidden=stop_ids)
        self._filter = StopStringFilter(list(stop_strings))
        self._last_color = ""
        self._color = stream.isatty() and "NO_COLOR" not in os.environ if color is None else color

    def write_prompt(self, text: str) -> None:
        """Write the text that is continued."""
        self._write(text, PROMPT)

    def write_legend(self) -> None:
        """Write what the colors mean, if there are colors."""
        if self._color:
            meanings = (f"{color}{load_words().tokens[kind]}{RESET}" for kind, color in COLORS.items())
            self._stream.write(", ".join(meanings) + "\n")

    def write(self, verified: VerifiedTokens) -> None:
        """Write verified tokens."""
        for ids, color in ((verified.accepted, ACCEPTED), (verified.own, OWN)):
            if ids:
                self._last_color = color
                self._write_text(self._filter.feed("".join(map(self._detokenizer.step, ids))))

    def end(self, unverified: Sequence[int] = ()) -> None:
        """Write the unverified tokens, marked as such even without colors, and end the line."""
        tail = "".join(self._detokenizer.preview(unverified))
        if not tail:
            # What was held back: an incomplete character, or what might have become a stop string.
            self._write_text(self._filter.feed(self._detokenizer.flush()) + self._filter.flush())
        if tail:
            self._write(tail if self._color else f"[unverified: {tail}]", UNVERIFIED)
        self._write("\n", "")

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; no more text is written then."""
        return self._filter.found

    def _write_text(self, text: str) -> None:
        self.text += text
        self._write(text, self._last_color)

    def _write(self, text: str, color: str) -> None:
        if text:
            # In a pipe, the text is what was generated.
            text = escape(text, keep="\n\t") if self._stream.isatty() else text
            self._stream.write(f"{color}{text}{RESET}" if color and self._color else text)
            self._stream.flush()
