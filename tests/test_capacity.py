"""The benchmark `capacity`: replayed boards on a real verifier, and the simulation of them."""

from __future__ import annotations

import pytest
import torch

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.verifier.client import VerifierClient
from tests.benchmarks import capacity
from tests.benchmarks.capacity import Boards, BoardTimes, ReplayedText, RunResult
from tests.conftest import serving
from tests.toy_family import FAMILY

PROMPT = [5, 6, 7, 8, 9]
TEXTS = [
    ReplayedText(PROMPT, 0, list(range(capacity.TOKENS)), list(range(capacity.TOKENS))),
    ReplayedText(PROMPT, 1, list(range(capacity.TOKENS)), [0] * capacity.TOKENS),
]
TIMES = BoardTimes(draft=0.005, link=0.055)


def test_draft_tokens_are_accepted_up_to_the_first_wrong_one() -> None:
    text = ReplayedText(PROMPT, 0, [1, 2, 3, 4, 5], [1, 2, 0, 4, 5])
    assert [text.accepted(position, 2) for position in range(5)] == [2, 1, 0, 2, 1]


async def test_boards_that_draft_and_boards_that_do_not_get_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "MIN_ANSWERS", 4)
    monkeypatch.setattr(capacity, "TOKENS", 16)
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    async with serving(Target(FAMILY / "target-v1", device="cpu", dtype=torch.float32)) as server:
        async with VerifierClient(server.url) as client:
            texts = [await capacity.record_text(client, draft, PROMPT, seed) for seed in range(2)]
        assert all(len(text.ids) == len(text.drafted) == capacity.TOKENS for text in texts)
        assert sum(text.accepted(position, 1) for text in texts for position in range(capacity.TOKENS)) > 0
        boards = Boards(server.url, texts, BoardTimes(0.0, 0.0))
        for drafts in (False, True):
            # Compares every text.
            result = await boards.run(3, drafts=drafts)
            assert len(result.seconds_per_token) >= capacity.MIN_ANSWERS
            assert result.slow_ms > 0
            assert result.forward_seconds > 0
            assert result.tokens_per_second > 0


def test_a_simulated_board_alone_takes_its_rounds_one_after_the_other() -> None:
    def forward_seconds(rows: int) -> float:
        return 0.01 * rows

    streaming = capacity.simulate(1, TEXTS[:1], TIMES, forward_seconds, drafts=False)
    assert streaming == pytest.approx(10, rel=0.01)
    # Five tokens of five rows a round.
    drafting = capacity.simulate(1, TEXTS[:1], TIMES, forward_seconds, drafts=True)
    assert drafting == pytest.approx((50 + 55 + 4 * 5) / 5, rel=0.1)
    # Nothing is accepted.
    rejected = capacity.simulate(1, TEXTS[1:], TIMES, forward_seconds, drafts=True)
    assert rejected == pytest.approx(50 + 55 + 4 * 5, rel=0.05)


def test_simulated_boards_wait_for_each_other() -> None:
    alone, crowd = (
        capacity.simulate(count, TEXTS, TIMES, lambda rows: 0.01 + 0.001 * rows, drafts=False) for count in (1, 50)
    )
    assert alone == pytest.approx(11, rel=0.01)
    assert crowd == pytest.approx(60, rel=0.1)


def test_a_simulation_may_serve_more_boards_than_were_measured() -> None:
    streaming = {count: RunResult([0.01 + 0.001 * count], 0.01 + 0.001 * count, 1.0) for count in (1, 2, 4, 8)}
    measured = {1: RunResult([0.03], 0.0, 1.0), 2: RunResult([0.5], 0.0, 1.0)}
    values = capacity.compare_simulation(measured, streaming, TEXTS[:1], TIMES, drafts=True)
    assert values[capacity.simulated_quantity(60).name] > 2
    assert 0 < values[capacity.ERROR.name] < 100


def test_capacity_is_the_last_count_before_a_goal_is_missed() -> None:
    slow_ms = {1: 10.0, 2: 50.0, 3: 70.0, 4: 55.0}
    assert capacity.find_capacity(slow_ms.__getitem__, 60) == 2
    assert capacity.find_capacity(slow_ms.__getitem__, 5) == 0
    assert RunResult([0.01] * 19 + [0.5], 0.0, 0.0).slow_ms == pytest.approx(34.5)


def test_a_fleet_needs_verifiers_for_its_busiest_hour() -> None:
    # 100,000 boards, 50 answers a day of 10 s: 579 at once in the mean, 1,042 at the peak.
    assert 104 < capacity.verifiers_needed(100_000, 10.0, 10, 0) < 118
    assert capacity.verifiers_needed(1_000, 10.0, 100, 0) == 1
