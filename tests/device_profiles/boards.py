"""A profile to change, as TOML is read: what tests of profiles share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tomli_w

BOARD: dict[str, Any] = {
    "name": "board",
    "title": "A board",
    "origin": "measured",
    "processor": {
        "model": "4 x Core",
        "cores": 4,
        "weight_bytes_per_second": 5e9,
        "prefill_bytes_per_second": 20e9,
        "origin": "measured",
        "sources": ["a stopwatch"],
    },
    "power": {"idle_watts": 2.0, "busy_watts": 6.0, "origin": "measured", "sources": ["a meter"]},
    "radio": {
        "lte": {
            "joules_per_byte_sent": 4e-6,
            "joules_per_byte_received": 5e-7,
            "active_watts": 1.5,
            "tail_watts": 1.0,
            "tail_seconds": 10.0,
            "origin": "published",
            "sources": ["a paper"],
        }
    },
    "sensors": {"lines": {"ina219": "board"}},
    "draft": [
        {
            "bundle": "small",
            "sha256": "0" * 64,
            "weight_bytes": 9_000_000,
            "threads": 1,
            "milliseconds": {"16": 2.0, "116": 3.0, "1116": 5.0},
            "prefill_tokens_per_second": 2000.0,
            "watts": 4.0,
        },
        {
            "bundle": "small",
            "sha256": "0" * 64,
            "weight_bytes": 9_000_000,
            "threads": 4,
            "milliseconds": {"16": 1.0, "1116": 6.0},
            "prefill_tokens_per_second": 5000.0,
        },
    ],
}


def changed(path: str, value: object) -> dict[str, Any]:
    """BOARD with the field at `path`, such as `power.idle_watts` or `draft.0.threads`; None removes it."""
    board = copy.deepcopy(BOARD)
    *way, field = path.split(".")
    table: Any = board
    for key in way:
        table = table[int(key)] if isinstance(table, list) else table[key]
    table.pop(field, None)
    if value is not None:
        table[field] = value
    return board


def save(directory: Path, board: dict[str, Any] = BOARD) -> Path:
    file = directory / "board.toml"
    file.write_text(tomli_w.dumps(board))
    return file
