"""What the planner has learned survives a restart, and a file that cannot be used harms nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from edge_runtime.cli import planner_state
from edge_runtime.cli.planner_state import MAX_AGE_SECONDS, MAX_FILE_BYTES, PlannerStateStore
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner
from tests.edge_runtime.planning.rounds import make_outcome


def make_planner(rounds: int = 0, version: str = "v1") -> AnalyticPlanner:
    """A planner that has seen so many rounds in which every draft token was rejected."""
    planner = AnalyticPlanner(Objective(), DeviceModel())
    for index in range(rounds):
        outcome = make_outcome([0.9, 0.8], 0, siblings=2, version=version, left=100 - index)
        planner.plan(outcome.conditions)
        planner.observe(outcome)
    return planner


def acceptance_of(planner: AnalyticPlanner, version: str = "v1") -> float:
    return planner._acceptance.get(version, 0.0).first_stage_table().acceptance


def restored(store: PlannerStateStore) -> AnalyticPlanner | None:
    planner = make_planner()
    return planner if store.restore(planner) else None


def test_a_planner_continues_from_the_file(tmp_path: Path) -> None:
    learned = make_planner(40)
    PlannerStateStore(tmp_path / "new", "draft").save(learned)
    planner = restored(PlannerStateStore(tmp_path / "new", "draft"))
    assert planner is not None
    assert planner.state() == learned.state()
    assert planner.regret.tokens == learned.regret.tokens < 20.0
    assert acceptance_of(planner) < 0.5 * acceptance_of(make_planner())
    # A version that it has not met inherits the evidence.
    assert acceptance_of(planner, "v2") < 0.7 * acceptance_of(make_planner())
    (path,) = (path for path in (tmp_path / "new").iterdir() if path.suffix == ".json")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_of_another_draft_or_too_old_is_ignored(tmp_path: Path) -> None:
    PlannerStateStore(tmp_path, "draft", lambda: 1e9).save(make_planner(5))
    assert restored(PlannerStateStore(tmp_path, "other", lambda: 1e9)) is None
    assert restored(PlannerStateStore(tmp_path, "draft", lambda: 1e9 + MAX_AGE_SECONDS + 1)) is None
    assert restored(PlannerStateStore(tmp_path, "draft", lambda: 1e9 + MAX_AGE_SECONDS)) is not None
    # The clock of a board that has just started may not be set yet.
    assert restored(PlannerStateStore(tmp_path, "draft", lambda: 0.0)) is not None


def test_a_damaged_file_is_named_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PlannerStateStore(tmp_path, "draft")
    store.save(make_planner(5))
    good = store.path.read_bytes()
    document = msgspec.json.decode(good)
    hits = document["state"]["acceptance"][0]["hits"]
    hits[0][0] = 1e6
    too_many = msgspec.json.encode(document)
    hits[0][0] = -1.0
    negative = msgspec.json.encode(document)
    hits[0] = hits[0][:-1]
    short = msgspec.json.encode(document)
    bad = (b"", good[:-20], b"\xff" + good, good.replace(b'"format":1', b'"format":2'), too_many, negative, short)
    for contents in (*bad, b" " * (MAX_FILE_BYTES + 1)):
        caplog.clear()
        store.path.write_bytes(contents)
        assert restored(store) is None
        assert str(store.path) in caplog.text
    store.save(make_planner(6))
    assert restored(PlannerStateStore(tmp_path, "draft")) is not None


def test_a_directory_that_cannot_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = PlannerStateStore(tmp_path / "file" / "below", "draft")
    for rounds in (1, 2):
        store.save(make_planner(rounds))
    assert caplog.text.count("cannot keep what the planner learns") == 1


def test_nothing_is_written_if_nothing_was_learned(tmp_path: Path) -> None:
    store = PlannerStateStore(tmp_path, "draft")
    planner = make_planner(3)
    store.save(planner)
    before = store.path.stat().st_mtime_ns
    store.save(planner)
    store.save(FixedPlanner(FIXED_PLAN))
    assert store.path.stat().st_mtime_ns == before
    assert not store.restore(FixedPlanner(FIXED_PLAN))


async def test_the_file_is_written_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_state, "SAVE_INTERVAL_SECONDS", 0.01)
    store = PlannerStateStore(tmp_path, "draft")
    planner = make_planner(3)
    task = asyncio.create_task(store.keep_saving(lambda: planner))
    while not store.path.exists():  # noqa: ASYNC110 - a thread writes it
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    assert restored(PlannerStateStore(tmp_path, "draft")) is not None
