"""The circuit breaker: drafts that are almost never accepted are ignored, and the text does not change."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import httpx
import pytest

from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.draft_breaker import (
    MAX_BACKOFF_DRAFTS,
    MAX_BACKOFF_SECONDS,
    MIN_BACKOFF_DRAFTS,
    WINDOW_ROUNDS,
    DraftCircuitBreaker,
)
from cloud_verifier.engine.principals import hash_token
from cloud_verifier.model.target import Target
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, running

ENDLESS = Sampling(ignore_eos=True)


def count_verified(breaker: DraftCircuitBreaker, rounds: int, rows: int, saved: int) -> int:
    """Offer drafts for a number of rounds; returns how many were verified."""
    count = 0
    for _ in range(rounds):
        if breaker.allows_draft():
            breaker.record(rows, saved)
            count += 1
    return count


def test_drafts_that_are_never_accepted_are_ignored_with_exponential_backoff() -> None:
    breaker = DraftCircuitBreaker(lambda: 0.0)
    assert count_verified(breaker, WINDOW_ROUNDS, 8, 0) == WINDOW_ROUNDS
    assert breaker.is_open
    assert count_verified(breaker, MIN_BACKOFF_DRAFTS, 8, 0) == 0
    assert count_verified(breaker, 1, 8, 0) == 1
    # The backoff is 16, 32, 64, 128 and from then on 256 drafts.
    assert count_verified(breaker, 16 + 1 + 32 + 1 + 64 + 1 + 128 + 1, 8, 0) == 4
    assert count_verified(breaker, 10 * (MAX_BACKOFF_DRAFTS + 1), 8, 0) == 10


def test_a_board_that_hardly_drafts_is_probed_after_some_time() -> None:
    now = 0.0
    breaker = DraftCircuitBreaker(lambda: now)
    count_verified(breaker, 1000, 8, 0)
    assert breaker.is_open and not breaker.allows_draft()
    now = MAX_BACKOFF_SECONDS + 1
    assert breaker.allows_draft()
    assert not breaker.allows_draft()


def test_one_good_draft_closes_the_breaker() -> None:
    breaker = DraftCircuitBreaker(lambda: 0.0)
    count_verified(breaker, WINDOW_ROUNDS, 8, 0)
    assert count_verified(breaker, MIN_BACKOFF_DRAFTS + 1, 8, 5) == 1
    assert not breaker.is_open
    assert count_verified(breaker, 1000, 8, 5) == 1000


def test_rare_acceptance_below_the_threshold_opens_the_breaker() -> None:
    breaker = DraftCircuitBreaker(lambda: 0.0)
    probes = 0
    for index in range(20_000):
        if breaker.allows_draft():
            probes += 1
            # One token saved by every hundredth draft of 4 rows: a ratio of 0.0025, far below the threshold.
            breaker.record(4, int(probes % 100 == 0))
        assert index < 2000 or probes < 0.2 * index
    assert breaker.is_open


@pytest.mark.parametrize(("rows", "chance"), [(1, 0.1), (5, 0.3), (4, 0.5), (32, 0.8), (71, 0.8)])
def test_the_breaker_never_opens_for_useful_drafts(rows: int, chance: float) -> None:
    """Each draft token survives with probability `chance`; no draft is ignored in 20,000 rounds."""
    breaker, noise = DraftCircuitBreaker(lambda: 0.0), random.Random(3)
    for _ in range(20_000):
        assert breaker.allows_draft()
        saved = sum(1 for _ in itertools.takewhile(lambda _: noise.random() < chance, range(min(rows, 32))))
        breaker.record(rows, saved)


def test_the_breaker_does_not_open_on_few_rows() -> None:
    breaker = DraftCircuitBreaker(lambda: 0.0)
    assert count_verified(breaker, 90, 1, 0) == 90
    assert not breaker.is_open


# Over HTTP


def metric_sum(url: str, name: str) -> float:
    """Sum of a metric over all labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert values, name
    return sum(values)


@pytest.mark.slow
def test_ignored_drafts_do_not_change_the_text_and_good_drafts_close_the_breaker(
    tiny: Target, reference_text: ReferenceText
) -> None:
    truth = reference_text(PROMPT, 260, ENDLESS)

    def wrong_draft(at: int) -> list[int]:
        return [(truth[at] + 1) % 300] * 8

    with running(tiny) as url, ProtocolClient(url) as client:
        session = client.open(sampling=ENDLESS)
        for _ in range(WINDOW_ROUNDS):
            session.run_round(draft=wrong_draft(len(session.ids) - 4))
        assert metric_sum(url, "flexspec_spec_decode_num_drafts_total") == WINDOW_ROUNDS
        for _ in range(MIN_BACKOFF_DRAFTS):
            # These drafts are right, but ignored: nothing is accepted, and the target generates its own tokens.
            known = len(session.ids) - 4
            frame = session.run_round(draft=truth[known : known + 4], n=2)
            assert (frame.accepted, frame.tokens) == (0, truth[known : known + 2])
        assert metric_sum(url, "flexspec_drafts_ignored_total") == MIN_BACKOFF_DRAFTS
        # A repeated round must still have the same contents.
        assert client.post(session.path, session.next_round(round=session.number)).status_code == 409
        for _ in range(10):
            known = len(session.ids) - 4
            assert session.run_round(draft=truth[known : known + 4]).accepted == 4
        assert session.ids == PROMPT + truth[: len(session.ids) - 4]


def test_a_repeated_round_with_an_ignored_draft_gets_the_recorded_reply(
    tiny: Target, reference_text: ReferenceText
) -> None:
    truth = reference_text(PROMPT, 60, ENDLESS)
    with running(tiny) as url, ProtocolClient(url) as client:
        session = client.open(sampling=ENDLESS)
        for _ in range(WINDOW_ROUNDS):
            session.run_round(draft=[(truth[len(session.ids) - 4] + 1) % 300] * 8)
        request = session.next_round(draft=truth[len(session.ids) - 4 :][:3], siblings={0: [7]})
        first, again = client.post(session.path, request), client.post(session.path, request)
        assert first.content == again.content
        session.run_round(draft=request.draft, siblings=request.siblings)
        assert session.frame.accepted == 0


def test_new_sessions_of_a_principal_share_its_breaker(
    tiny: Target, reference_text: ReferenceText, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(f"[bad]\nsha256 = '{hash_token('bad')}'\n[good]\nsha256 = '{hash_token('good')}'\n")
    truth = reference_text(PROMPT, 60, ENDLESS)
    with (
        running(tiny, authenticator=Authenticator(file)) as url,
        ProtocolClient(url, token="bad") as bad,
        ProtocolClient(url, token="good") as good,
    ):
        for _ in range(4):
            session = bad.open(sampling=ENDLESS)
            for _ in range(WINDOW_ROUNDS // 4):
                session.run_round(draft=[(truth[len(session.ids) - 4] + 1) % 300] * 8)
        assert bad.open(sampling=ENDLESS, draft=truth[:4]).frame.accepted == 0
        assert good.open(sampling=ENDLESS, draft=truth[:4]).frame.accepted == 4
