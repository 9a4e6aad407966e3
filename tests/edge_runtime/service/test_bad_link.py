"""The board's service on a link that fails in every way, between real processes: right texts or typed errors, in time.

A short form of `python -m tests.benchmarks.faults`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.emulator.asking import Case, Kind, cases
from tests.emulator.faults import run
from tests.emulator.network import Network, lacking
from tests.emulator.scene import TARGET, Scene

pytestmark = pytest.mark.slow

ANSWERS = 10
# Every one of them strikes within so few answers.
FAULTS = (
    "cable-1s",
    "cable-4s",
    "loss",
    "rtt-jumps",
    "verifier-killed",
    "503",
    "half-open",
    "cut",
    "corrupted",
    "board-killed",
)


@pytest.fixture(scope="module")
def known() -> list[Case]:
    return cases(TARGET)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    reason = lacking()
    if reason:
        pytest.skip(reason)
    with Network(seed=2) as network:
        made = Scene(network)
        asyncio.run(made.start())
        try:
            yield made
        finally:
            made.stop()


@pytest.mark.parametrize("fault", FAULTS)
async def test_whatever_the_link_does_the_text_is_right_or_the_error_typed(
    scene: Scene, known: list[Case], fault: str
) -> None:
    with scene.network.inside("board"):
        # Memory and files are for longer runs to judge.
        row = await run(scene, fault, known, ANSWERS, warm_up=4, settling=0.0)
    assert not row.broken, row.details
    assert row.answers.total() == ANSWERS
    if fault != "board-killed":
        # Who waits is answered: errors are for those that asked not to wait, one in seven.
        assert row.answers[Kind.RIGHT] + row.answers[Kind.UNVERIFIED] >= ANSWERS - 3, row.details
