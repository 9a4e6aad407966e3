"""Text as it comes, and nothing of what may be a stop string."""

from __future__ import annotations


class StopFinder:
    """Passes text through up to the stop string that is complete first; the same text, however it is cut.

    Attributes:
        found: it has come, and nothing more passes.
    """

    def __init__(self, stops: list[str]) -> None:
        self.found = False
        self._stops = stops
        # The longest end of the text that may yet become a stop string.
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown, now that `text` is known too."""
        if self.found:
            return ""
        self._held += text
        matches = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if matches:
            self.found = True
            shown, self._held = self._held[: min(matches)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def end(self) -> str:
        """What was held back, now that the text is over."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
