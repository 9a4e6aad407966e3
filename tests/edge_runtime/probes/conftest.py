"""Recorded boards, and trees of files written by tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.probes.reader import Reader, RecordedPrograms, Roots

BOARDS = Path(__file__).parent / "boards"
NAMES = sorted(path.name for path in BOARDS.iterdir())

Tree = Callable[[dict[str, str]], Roots]


def roots_of(board: Path) -> Roots:
    """Roots that read a tree with `sysfs/`, `procfs/` and `bin/`."""
    return Roots(board / "sysfs", board / "procfs", RecordedPrograms(board / "bin"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files, in addition to those written before, and return roots that read them."""

    def write(files: dict[str, str]) -> Roots:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return roots_of(tmp_path)

    return write


@pytest.fixture
def reader(tree: Tree) -> Callable[..., Reader]:
    """Write files and return a reader of them at a given time."""

    def make(files: dict[str, str], now: float = 0.0) -> Reader:
        return Reader(tree(files), now)

    return make
