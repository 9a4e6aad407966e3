"""Parses TOML with the line and column of every key: values by the standard library, positions by tomlkit.

tomlkit writes a document back exactly as it was read. A marker inserted into the white space before every item
therefore shows, in the text that tomlkit writes, where each item is. The standard library parses first because its
syntax errors always have a line; tomlkit's error for a duplicate key has none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple

import tomlkit
from tomlkit.container import Container
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, InlineTable, Item, Table

# No TOML document contains this character.
MARKER = "\0"
_SYNTAX_ERROR = re.compile(
    r"(?P<message>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)

KeyPath = tuple[str, ...]


class TomlPosition(NamedTuple):
    """Line and column in a file, both from 1; 0 if unknown."""

    line: int
    column: int


class TomlDocument(NamedTuple):
    """A parsed document.

    Attributes:
        values: the values, as `tomllib` returns them.
        positions: position of every key in tables and inline tables, by its path; of an array of tables, its start.
    """

    values: dict[str, Any]
    positions: dict[KeyPath, TomlPosition]

    def position(self, path: KeyPath) -> TomlPosition:
        """Return the first position of a key or of its contents, else that of the table that contains it."""
        while path:
            inside = [position for key, position in self.positions.items() if key[: len(path)] == path]
            if inside:
                return min(inside)
            path = path[:-1]
        return TomlPosition(0, 0)


class TomlError(ValueError):
    """The text is not TOML.

    Attributes:
        position: position of the syntax error.
    """

    def __init__(self, message: str, position: TomlPosition) -> None:
        super().__init__(message)
        self.position = position


def parse(text: str) -> TomlDocument:
    """Parse a TOML document. Raises TomlError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _SYNTAX_ERROR.fullmatch(str(error))
        if match is None:
            raise TomlError(str(error), TomlPosition(0, 0)) from None
        if match["line"]:
            position = TomlPosition(int(match["line"]), int(match["column"]))
        else:
            position = _position_at(text, len(text))
        raise TomlError(match["message"], position) from None
    except RecursionError:
        raise TomlError("nested too deeply", TomlPosition(0, 0)) from None
    return TomlDocument(values, _find_positions(text))


def _find_positions(text: str) -> dict[KeyPath, TomlPosition]:
    # tomllib converts \r\n to \n. Do the same here, so that a carriage return does not count as a column.
    text = text.replace("\r\n", "\n")
    try:
        document = tomlkit.parse(text)
    except (TOMLKitError, ValueError, RecursionError):
        # The two parsers rarely disagree, and if they do, only the positions are lost.
        return {}
    paths: list[KeyPath] = []
    for path, item in _walk(document, ()):
        item.trivia.indent += f"{MARKER}{len(paths)}{MARKER}"
        paths.append(path)
    positions: dict[KeyPath, TomlPosition] = {}
    # Text before the first marker, then alternately an item's number and the text up to the next marker.
    written, *rest = document.as_string().split(MARKER)
    for number, text_after in zip(rest[::2], rest[1::2], strict=True):
        # A table may be written in several parts; the first one counts.
        positions.setdefault(paths[int(number)], _position_at(text, len(written)))
        written += text_after
    return positions if written == text else {}


def _walk(container: Container, path: KeyPath) -> Iterator[tuple[KeyPath, Item]]:
    for key, item in container.body:
        if key is None:
            continue
        item_path = (*path, key.key)
        if isinstance(item, AoT):
            yield item_path, item.body[0]
            continue
        # The super-table `a` of [a.b] or of a.b = 1 has no position of its own.
        if not (isinstance(item, Table) and item.is_super_table()):
            yield item_path, item
        if isinstance(item, Table | InlineTable):
            yield from _walk(item.value, item_path)


def _position_at(text: str, offset: int) -> TomlPosition:
    return TomlPosition(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))
