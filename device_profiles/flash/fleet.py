"""Many cards from one image, each with its own flexspec.toml: a CSV file with a line for each board.

    hostname,verifier_token,api_key,note
    kitchen,3f9c...,,left shelf
    garage,77ab...,,

The columns are fields of [board], [wifi] and [secrets], and, with their table, of others, such as `verifier.urls`; the
column `note` is for people. An empty cell changes nothing. What all boards have in common is in one flexspec.toml.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec
import tomlkit

from device_profiles.first_boot.board_file import FILE_NAME, OWN_TABLES, read_board_file
from device_profiles.image.block_map import BlockMap, BlockRange, fat_spans, map_image
from device_profiles.image.boot_partition import ImagePartition
from device_profiles.image.disk import partition_offset
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import SETTINGS, from_text
from edge_runtime.settings.loading import ConfigurationError

NOTE = "note"
# Columns without a table, and the table that they belong to.
SHORT_COLUMNS = {
    field: table for table in ("board", "wifi", "secrets") for field in OWN_TABLES[table].__struct_fields__
}


class FleetBoard(NamedTuple):
    """One line of the CSV file.

    Attributes:
        name: its host name, or else the number of its line.
        configuration: the text of its flexspec.toml.
        note: for people.
    """

    name: str
    configuration: str
    note: str


def read_fleet(path: Path, common: str, scratch: Path) -> list[FleetBoard]:
    """Read and check the boards of a CSV file; `common` is the flexspec.toml that all of them begin with.

    Raises:
        InputError: a column is unknown, two boards have the same name, or a configuration has errors.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    boards: list[FleetBoard] = []
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise InputError(f"{path}:{number}: has another number of columns than the first line")
        text = _personal(common, {column.strip(): value.strip() for column, value in line.items()}, f"{path}:{number}")
        name = (line.get("hostname") or line.get("board.hostname") or f"line {number}").strip()
        if name in (board.name for board in boards):
            raise InputError(f"{path}:{number}: there is another board of the name {name}")
        probe = scratch / FILE_NAME
        probe.write_text(text, encoding="utf-8")
        try:
            read_board_file(probe)
        except ConfigurationError as error:
            messages = "; ".join(problem.message for problem in error.problems)
            raise InputError(f"{path}:{number}: {messages}") from None
        finally:
            probe.unlink()
        boards.append(FleetBoard(name, text, line.get(NOTE, "")))
    if not boards:
        raise InputError(f"{path} has no boards: it needs a line of column names, and one for each board")
    return boards


def personalise(image: Path, block_map: BlockMap, configuration: str, target: Path) -> BlockMap:
    """Copy an image, and write this flexspec.toml into its boot partition. Returns the map of the copy."""
    shutil.copyfile(image, target)
    ImagePartition(target).write(FILE_NAME, configuration.encode())
    offset, size = partition_offset(target)
    with target.open("rb") as file:
        changed = fat_spans(file, offset)
    inside = map_image(target, changed)
    first, last = offset // block_map.block_bytes, (offset + size - 1) // block_map.block_bytes
    outside = [part for whole in block_map.ranges for part in _outside(whole, first, last)]
    ranges = sorted([*outside, *inside.ranges])
    return BlockMap(block_map.image_bytes, block_map.block_bytes, ranges)


def _outside(part: BlockRange, first: int, last: int) -> list[BlockRange]:
    """Return what of a range is outside of the blocks `first` to `last`, without a checksum if it was cut."""
    if part.last < first or part.first > last:
        return [part]
    before, after = BlockRange(part.first, first - 1), BlockRange(last + 1, part.last)
    return [rest for rest in (before, after) if rest.first <= rest.last]


def _personal(common: str, cells: dict[str, str], place: str) -> str:
    document = tomlkit.parse(common)
    for column, value in cells.items():
        if not value or column == NOTE:
            continue
        table, _, field = column.rpartition(".")
        table = table or SHORT_COLUMNS.get(field, "")
        known = f"{table}.{field}" in SETTINGS or (table in OWN_TABLES and field in OWN_TABLES[table].__struct_fields__)
        if not known:
            raise InputError(f"{place}: there is no setting for the column {column!r}; use for instance hostname")
        if table not in document:
            document.add(table, tomlkit.table())
        document[table][field] = _value(table, field, value)
    return tomlkit.dumps(document)


def _value(table: str, field: str, text: str) -> object:
    if table in OWN_TABLES:
        annotation = next(entry.type for entry in msgspec.structs.fields(OWN_TABLES[table]) if entry.name == field)
    else:
        annotation = SETTINGS[f"{table}.{field}"].type
    value: object = from_text(text, annotation)
    return value
