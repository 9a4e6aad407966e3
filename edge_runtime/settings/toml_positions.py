"""TOML with the place of every key: values by the standard library's parser, places by tomlkit's.

tomlkit writes a document back exactly as it was read. So a mark put in the white space before every item shows, in what
is written back, where each item stands. The standard library's parser is asked first because it names the line of every
syntax error, which tomlkit's does not of a key that is there twice.
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

# No TOML document contains it.
MARK = "\0"
_SYNTAX = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL)

Path = tuple[str, ...]


class Place(NamedTuple):
    """Line and column in a file, both from 1; 0 where unknown."""

    line: int
    column: int


class Document(NamedTuple):
    """A parsed document.

    Attributes:
        values: as `tomllib` gives them.
        places: of every key in tables and inline tables, by its path; of arrays of tables, their beginning.
    """

    values: dict[str, Any]
    places: dict[Path, Place]

    def place(self, path: Path) -> Place:
        """Where `path` is: the first key that it, or else what it is in, begins with."""
        while path:
            inside = [place for key, place in self.places.items() if key[: len(path)] == path]
            if inside:
                return min(inside)
            path = path[:-1]
        return Place(0, 0)


class TomlError(ValueError):
    """Not TOML.

    Attributes:
        place: where the parser stumbled.
    """

    def __init__(self, message: str, place: Place) -> None:
        super().__init__(message)
        self.place = place


def parse(text: str) -> Document:
    """The document in `text`. Raises TomlError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _SYNTAX.fullmatch(str(error))
        if found is None:
            raise TomlError(str(error), Place(0, 0)) from None
        place = Place(int(found["line"]), int(found["column"])) if found["line"] else _place(text, len(text))
        raise TomlError(found["what"], place) from None
    except RecursionError:
        raise TomlError("nested too deeply", Place(0, 0)) from None
    return Document(values, _places(text))


def _places(text: str) -> dict[Path, Place]:
    # tomllib forgives \r\n by turning it into \n, and so do we, lest a carriage return count as a column.
    text = text.replace("\r\n", "\n")
    try:
        document = tomlkit.parse(text)
    except (TOMLKitError, ValueError, RecursionError):
        # What one parser accepts and the other does not is rare, and then only the line is lost.
        return {}
    paths: list[Path] = []
    for path, item in _items(document, ()):
        item.trivia.indent += f"{MARK}{len(paths)}{MARK}"
        paths.append(path)
    places: dict[Path, Place] = {}
    written = ""
    # The text before a mark, the number in it, the text before the next mark, and so on.
    before, *rest = document.as_string().split(MARK)
    written += before
    for number, behind in zip(rest[::2], rest[1::2], strict=True):
        # A table may be written in several parts; the first one counts.
        places.setdefault(paths[int(number)], _place(text, len(written)))
        written += behind
    return places if written == text else {}


def _items(container: Container, path: Path) -> Iterator[tuple[Path, Item]]:
    for key, item in container.body:
        if key is None:
            continue
        inner = (*path, key.key)
        if isinstance(item, AoT):
            yield inner, item.body[0]
            continue
        # The super-table of [a.b] or a.b = 1 is nowhere itself.
        if not (isinstance(item, Table) and item.is_super_table()):
            yield inner, item
        if isinstance(item, Table | InlineTable):
            yield from _items(item.value, inner)


def _place(text: str, offset: int) -> Place:
    return Place(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))
