"""Escapes text from others for terminals and logs, so that it neither passes for our own nor controls the terminal.

Names in archives, paths of requests, header values and messages of peers may hold escape sequences, line breaks and
marks that reverse the direction of text. Everything that commands print for people, and every text of the log (`logs`),
passes through `escape`; JSON and generated texts in a pipe stay as they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

# `rich` is slow to import, and most commands need none of it.
if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult

# Control characters (C0, DEL, C1), line separators, halves of surrogate pairs, and what changes the direction of text
# (unicode.org/reports/tr9, table 1) or is invisible (zero-width space, byte-order mark, tags). Joiners, which emoji and
# some scripts need, are left.
HARMFUL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def escape(text: str, keep: str = "") -> str:
    r"""Return `text` with every harmful character written as Python writes it, such as `\x1b`.

    Args:
        keep: control characters that stay.
    """
    return HARMFUL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def escape_json(text: str) -> str:
    r"""Return JSON of the same value in which every harmful character is written as in JSON, such as `\u009b`."""
    return HARMFUL.sub(lambda match: match[0] if match[0] in "\t\n" else json.dumps(match[0])[1:-1], text)


def print_line(text: object) -> None:
    """Print one line on standard output."""
    print(escape(str(text)))


def print_note(text: object) -> None:
    """Print a message to standard error. The second line and those after it are indented, unless they are already."""
    print(indent_lines(str(text).replace("\n  ", "\n")), file=sys.stderr)


def indent_lines(text: str) -> str:
    """Escape a text; its second line and those after it are indented, so that none passes for another message."""
    return "\n  ".join(map(escape, text.rstrip("\n").split("\n")))


def new_console(**options: Any) -> Console:
    """Return a `rich.console.Console` that escapes what it prints."""
    from rich.console import Console, RenderHook

    class EscapingHook(RenderHook):
        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return [Escaped(renderable) for renderable in renderables]

    console = Console(**options)
    console.push_render_hook(EscapingHook())
    return console


class Escaped:
    """Something that rich can print, escaped: rich lets escape sequences pass. `rich.live.Live` needs it explicitly."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        segments: Iterable[Segment] = console.render(self._renderable, options)
        for text, style, control in segments:
            yield Segment(text if control else escape(text, keep="\n"), style, control)
