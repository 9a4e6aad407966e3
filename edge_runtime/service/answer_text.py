"""The text of an answer from its tokens' text: reasoning and tool calls are separated, and stop strings end it."""

from __future__ import annotations

import copy
from typing import NamedTuple

from edge_runtime.service.stop_strings import StopStringFilter
from edge_runtime.service.tool_calls.output_format import OutputFormat
from edge_runtime.service.tool_calls.parser import CallDelta, MessageDelta, merge_calls


class ContentPreview(NamedTuple):
    """Content that unverified text would add; `stopped`: a stop string ends it."""

    content: str
    stopped: bool


class AnswerText:
    """Reads the text of one answer piece by piece.

    Stop strings are looked for in the content alone: a call or a thought that ends in the middle is of no use.

    Attributes:
        shown: characters of the text so far that are not held back.
        reasoning_tokens: tokens of the reasoning, its markers included.
    """

    def __init__(self, output: OutputFormat, stop_strings: list[str], include_stop: bool) -> None:
        self.shown = self.reasoning_tokens = 0
        self._parser = output.new_parser()
        self._stop_filter = StopStringFilter(stop_strings, include_stop)
        # What was read besides content and has not been taken.
        self._reasoning = ""
        self._calls: list[CallDelta] = []

    @property
    def calls(self) -> int:
        """Number of calls so far."""
        return self._parser.calls if self._parser else 0

    @property
    def stopped(self) -> bool:
        """Whether the text is complete: by a stop string, or by the only call that is allowed."""
        return self._stop_filter.found or (self._parser is not None and self._parser.complete)

    def feed(self, token_text: str) -> str:
        """Append the text of one token and return the content that can be shown now."""
        if self._parser is None:
            return self._show(token_text)
        # What is held back of other parts is not counted.
        self.shown += len(token_text)
        before = self._parser.in_reasoning
        delta = self._parser.feed(token_text)
        self.reasoning_tokens += before or self._parser.in_reasoning or bool(delta.reasoning)
        return self._add(delta)

    def flush(self) -> str:
        """Return the content that was held back; to be called at the end of the text."""
        content = self._add(self._parser.flush()) if self._parser else ""
        rest = self._stop_filter.flush()
        self.shown += 0 if self._parser else len(rest)
        return content + rest

    def preview(self, tail: str) -> ContentPreview:
        """Return the content that unverified text `tail` would add now, without appending it."""
        stop_filter = copy.copy(self._stop_filter)
        content = stop_filter.feed(self._parser.preview(tail) if self._parser else tail)
        return ContentPreview(content, stop_filter.found)

    def take(self) -> tuple[str, list[CallDelta]]:
        """Return the reasoning and the calls since the last call of this."""
        taken = self._reasoning, self._calls
        self._reasoning, self._calls = "", []
        return taken

    def _add(self, delta: MessageDelta) -> str:
        self._reasoning += delta.reasoning
        self._calls = merge_calls(self._calls, delta.calls)
        return self._stop_filter.feed(delta.content)

    def _show(self, text: str) -> str:
        content = self._stop_filter.feed(text)
        self.shown += len(content)
        return content
