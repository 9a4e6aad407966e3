"""Chunks of prompts take a set time, whatever the model and the machine."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_verifier.engine.prefill_pacing import (
    ALONE_FACTOR,
    CHUNK_SECONDS,
    FIRST_CHUNK_ROWS,
    MIN_CHUNK_ROWS,
    PrefillPacer,
)
from cloud_verifier.model.general_tier import UNBOUNDED


class Machine:
    """A runner whose forwards take `fixed` seconds and `row` seconds for each row."""

    exact = False

    def __init__(self, fixed: float, row: float, max_prefill_rows: int = 4096) -> None:
        self.fixed, self.row, self.max_prefill_rows = fixed, row, max_prefill_rows

    def seconds(self, rows: int) -> float:
        return self.fixed + self.row * rows


def prefill(pacer: PrefillPacer, machine: Any, forwards: int, *, alone: bool = False) -> list[float]:
    """The seconds of forwards that prefill what the pacer lets them."""
    seconds = []
    for _ in range(forwards):
        rows = pacer.limit(machine, alone=alone)
        seconds.append(machine.seconds(rows))
        pacer.observe(machine, rows, seconds[-1])
    return seconds


@pytest.mark.parametrize(
    "machine", [Machine(5e-3, 2e-5), Machine(1e-3, 1e-4), Machine(0.03, 1e-3)], ids=["GPU", "small", "fast CPU"]
)
def test_chunks_come_to_take_the_time_that_they_may(machine: Any) -> None:
    seconds = prefill(PrefillPacer(), machine, 12)
    assert all(0.8 * CHUNK_SECONDS < each < 1.05 * CHUNK_SECONDS for each in seconds[-3:])


def test_chunks_shrink_as_the_text_before_them_grows() -> None:
    pacer, machine = PrefillPacer(), Machine(5e-3, 2e-5)
    prefill(pacer, machine, 12)
    before = pacer.limit(machine, alone=False)
    for _ in range(20):
        machine.row *= 1.2
        # At most what one step of growth adds.
        assert prefill(pacer, machine, 1)[0] < 1.3 * CHUNK_SECONDS
    assert pacer.limit(machine, alone=False) < before / 10


def test_a_slow_machine_still_prefills_some_rows() -> None:
    pacer, machine = PrefillPacer(), Machine(0.5, 0.1)
    prefill(pacer, machine, 5)
    assert pacer.limit(machine, alone=False) == MIN_CHUNK_ROWS


def test_where_nothing_else_runs_chunks_are_larger_and_bounded_all_the_same() -> None:
    pacer, machine = PrefillPacer(), Machine(5e-3, 5e-5)
    seconds = prefill(pacer, machine, 12, alone=True)
    assert max(seconds[-3:]) < 1.1 * ALONE_FACTOR * CHUNK_SECONDS
    assert pacer.limit(machine, alone=True) > 4 * pacer.limit(machine, alone=False)


def test_the_rest_of_a_prompt_says_little_about_the_rows_that_fit() -> None:
    pacer, machine = PrefillPacer(), Machine(0.02, 2e-5)
    prefill(pacer, machine, 12)
    known = pacer.limit(machine, alone=False)
    for _ in range(5):
        pacer.observe(machine, 40, machine.seconds(40))
        pacer.observe(machine, 0, 0.02)
    assert pacer.limit(machine, alone=False) == known
    # One forward that was late for another reason halves the rows at most.
    pacer.observe(machine, known, 3.0)
    assert pacer.limit(machine, alone=False) >= known // 2


def test_a_measurement_at_start_is_where_it_begins() -> None:
    pacer, machine = PrefillPacer(), Machine(0.0, 1e-4)
    assert pacer.limit(machine, alone=False) == FIRST_CHUNK_ROWS
    pacer.calibrate(machine, 4096, machine.seconds(4096))
    assert pacer.limit(machine, alone=False) == pytest.approx(CHUNK_SECONDS / 1e-4, abs=1)


def test_what_cannot_be_split_is_not() -> None:
    whole = Machine(0.1, 0.1, UNBOUNDED)
    exact = Machine(0.1, 0.1, 128)
    exact.exact = True
    pacer = PrefillPacer()
    for machine in (whole, exact):
        prefill(pacer, machine, 1)
        assert pacer.limit(machine, alone=False) == machine.max_prefill_rows
