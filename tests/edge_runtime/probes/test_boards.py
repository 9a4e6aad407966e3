"""Whole snapshots of recorded boards, and of the same boards with each file broken in turn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.probes.snapshot import Prober, Snapshot
from tests.edge_runtime.probes.conftest import BOARDS, NAMES, roots_of

BINARY = b"\xff\xfe\x00\x9b\x80"
# Reading the first byte of a process's memory fails with an input/output error, for root too.
UNREADABLE = Path("/proc/self/mem")


def known(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot without its time and durations; of the probe reports, only the errors."""
    values: dict[str, Any] = msgspec.to_builtins(snapshot)
    del values["at"]
    values["probes"] = {name: report.errors for name, report in snapshot.probes.items() if report.errors}
    values["surroundings"] = msgspec.to_builtins(snapshot.surroundings())
    return values


def errors(snapshot: Snapshot) -> list[str]:
    return [error for report in snapshot.probes.values() for error in report.errors]


@pytest.mark.parametrize("name", NAMES)
def test_the_snapshot_of_a_board(name: str) -> None:
    snapshot = Prober(roots_of(BOARDS / name)).take()
    assert known(snapshot) == msgspec.json.decode((BOARDS / name / "expected.json").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_file_broken_in_turn(name: str, tmp_path: Path) -> None:
    board = tmp_path / name
    shutil.copytree(BOARDS / name, board)
    roots = roots_of(board)
    whole = known(Prober(roots).take())
    failed = 0
    for path in sorted(path for folder in ("sysfs", "procfs", "bin") for path in (board / folder).rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        path.unlink()
        removed = Prober(roots).take()
        assert errors(removed) == [], path

        path.symlink_to(UNREADABLE)
        unreadable = Prober(roots).take()
        path.unlink()
        path.write_bytes(b"")
        empty = Prober(roots).take()
        path.write_bytes(BINARY)
        binary = Prober(roots).take()
        path.write_bytes(content)

        for broken in (unreadable, binary):
            # A broken file gives the same readings as a missing one; if the file matters, the error is counted.
            if known(removed) != whole:
                program = path.name.partition("_")[0] if path.parent.name == "bin" else str(path)
                assert any(error.startswith((str(path), program)) for error in errors(broken)), path
            elif not errors(broken):
                assert known(broken) == whole, path
        for snapshot in (unreadable, empty, binary):
            assert not any("unexpected" in error for error in errors(snapshot)), path
            counted = [report for report in snapshot.probes.values() if report.errors]
            assert [report.failures for report in counted] == [1] * len(counted)
        failed += bool(errors(unreadable))
    assert failed > 10
    assert known(Prober(roots).take()) == whole


def test_a_board_without_sensors(tmp_path: Path) -> None:
    snapshot = Prober(roots_of(tmp_path)).take()
    values = known(snapshot)
    assert values.pop("probes") == {}
    assert set(values.pop("surroundings").values()) == {None}
    assert set(values.pop("processor").values()) == {None}
    assert set(values.values()) == {None}


def test_this_machine() -> None:
    prober = Prober()
    prober.take()
    snapshot = prober.take()
    assert snapshot.processor is not None and snapshot.processor.cores
    assert not any("unexpected" in error for error in errors(snapshot))
