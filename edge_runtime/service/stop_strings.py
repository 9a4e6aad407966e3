"""Filters generated text for stop strings while it streams."""

from __future__ import annotations


class StopStringFilter:
    """Passes text through up to the stop string that completes first, however the text is split into pieces.

    Text that may still become part of a stop string is held back until this is decided.

    Args:
        include: pass the stop string as well.

    Attributes:
        found: a stop string is complete; no more text passes.
    """

    def __init__(self, stop_strings: list[str], include: bool = False) -> None:
        self.found = False
        self._stop_strings = stop_strings
        self._include = include
        # The longest suffix of the text so far that may still become a stop string.
        self._held = ""

    def feed(self, text: str) -> str:
        """Append `text` and return what can be shown now."""
        if self.found:
            return ""
        self._held += text
        matches = [(start + len(stop), start) for stop in self._stop_strings if (start := self._held.find(stop)) >= 0]
        if matches:
            self.found = True
            end, start = min(matches)
            shown, self._held = self._held[: end if self._include else start], ""
            return shown
        keep = max((overlap(self._held, stop) for stop in self._stop_strings), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """Return what was held back; to be called at the end of the text."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
