"""How many tokens the verifier drafts for itself."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.engine.draft_lengths import TEXT_DECAY, AcceptanceEvidence, DraftLengths, StepTimes

LIMIT = 5
FORWARD, ROW = 0.008, 0.0002
# For the draft model to read a token of a prompt.
READ_SECONDS = 0.0005


def speed(length: int, acceptance: float, draft_seconds: float) -> float:
    """Tokens per second with drafts of a fixed length."""
    tokens = sum(acceptance**index for index in range(length + 1))
    return tokens / (length * draft_seconds + FORWARD + ROW * length)


class SimulatedText:
    """A text on a simulated clock, whose draft tokens are each accepted with a set probability.

    The draft model first reads the prompt, and later what was generated without it.
    """

    def __init__(self, lengths: DraftLengths, seed: int, draft_seconds: float, prompt: int = 0) -> None:
        self.acceptance = 0.0
        self._unread = prompt
        self.lengths, self._random, self._draft_seconds = lengths, Random(seed), draft_seconds
        self.evidence = AcceptanceEvidence(TEXT_DECAY)

    def generate(self, forwards: int) -> tuple[float, list[int]]:
        """Run forwards; return tokens per second, and the lengths of their drafts."""
        tokens, seconds, chosen = 0, 0.0, []
        for _ in range(forwards):
            length = self.lengths.choose(self.evidence, LIMIT)
            accepted = next((i for i in range(length) if self._random.random() >= self.acceptance), length)
            step = length * self._draft_seconds + FORWARD + ROW * length
            read_on = bool(length) and self._unread > LIMIT + 1
            if read_on:
                step += self._unread * READ_SECONDS
            self._unread = 1 if length else self._unread + 1
            self.lengths.record(self.evidence, length, accepted, None if read_on else step)
            tokens, seconds = tokens + accepted + 1, seconds + step
            chosen.append(length)
        return tokens / seconds, chosen


@pytest.mark.parametrize("draft_seconds", [0.0003, 0.001, 0.004, 0.012])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9])
def test_a_text_is_nearly_as_fast_as_with_the_best_length(acceptance: float, draft_seconds: float) -> None:
    text = SimulatedText(DraftLengths(), 1, draft_seconds)
    text.acceptance = acceptance
    text.generate(100)
    reached, _ = text.generate(2000)
    assert reached > 0.93 * max(speed(length, acceptance, draft_seconds) for length in range(LIMIT + 1))


def test_drafting_begins_again_when_it_pays_again() -> None:
    text = SimulatedText(DraftLengths(), 2, 0.002)
    text.generate(400)
    _, without = text.generate(100)
    text.acceptance = 0.95
    text.generate(400)
    _, later = text.generate(100)
    assert sum(without) < 30 and sum(later) > 300


def test_a_new_text_begins_with_what_others_showed() -> None:
    lengths = DraftLengths()
    for seed in range(5):
        text = SimulatedText(lengths, seed, 0.006)
        text.acceptance = 0.1
        text.generate(100)
    _, chosen = SimulatedText(lengths, 9, 0.006).generate(5)
    assert sum(chosen) <= 1


@pytest.mark.parametrize("prompt", [0, 300, 5000])
def test_what_the_draft_model_reads_first_keeps_no_text_from_drafting(prompt: int) -> None:
    lengths = DraftLengths()
    for seed in range(20):
        text = SimulatedText(lengths, seed, 0.001, prompt)
        text.acceptance = 0.9
        _, chosen = text.generate(200)
    assert sum(chosen) > 4 * len(chosen)


def test_one_slow_step_changes_little() -> None:
    text = SimulatedText(DraftLengths(), 3, 0.001)
    text.acceptance = 0.9
    text.generate(200)
    text.lengths.record(text.evidence, LIMIT, LIMIT, 1.0)
    _, chosen = text.generate(20)
    assert sum(chosen) > 3 * len(chosen)


def test_a_length_that_was_slow_once_is_tried_again() -> None:
    times = StepTimes()
    for length, seconds in ((5, 0.012), (0, 0.05)):
        times.record(length, seconds)
    for _ in range(3000):
        times.record(5, 0.012)
    slow = times.expect(0)
    assert slow is not None and slow < 0.012


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16), st.floats(0, 10))),
    st.integers(0, 16),
)
def test_a_length_is_always_possible(steps: list[tuple[int, int, float]], limit: int) -> None:
    lengths, evidence = DraftLengths(), AcceptanceEvidence(TEXT_DECAY)
    for drafted, accepted, seconds in steps:
        lengths.record(evidence, drafted, min(drafted, accepted), seconds)
        assert 0 <= lengths.choose(evidence, limit) <= limit
