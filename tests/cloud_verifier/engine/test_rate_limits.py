"""Books on drafts and tokens: when a draft is not worth verifying, and who has had enough."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import httpx
import pytest

from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.draft_breaker import (
    MAX_BACKOFF_DRAFTS,
    MIN_BACKOFF_DRAFTS,
    WINDOW_ROUNDS,
    DraftCircuitBreaker,
)
from cloud_verifier.engine.principals import Principal, hash_token
from cloud_verifier.engine.rate_limits import BURST_SECONDS, PrincipalAccount, TokenBucket
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import Alone
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, running

ENDLESS = Sampling(ignore_eos=True)


def verified(account: DraftCircuitBreaker, rounds: int, rows: int, gained: int) -> int:
    """How many of so many rounds were verified; each gained so much."""
    count = 0
    for _ in range(rounds):
        if account.allows_draft():
            account.record(rows, gained)
            count += 1
    return count


def test_drafts_that_never_match_are_soon_ignored_and_tried_ever_more_rarely() -> None:
    account = DraftCircuitBreaker(lambda: 0.0)
    assert verified(account, WINDOW_ROUNDS, 8, 0) == WINDOW_ROUNDS
    assert account.is_open
    assert verified(account, MIN_BACKOFF_DRAFTS, 8, 0) == 0
    assert verified(account, 1, 8, 0) == 1
    # 16, 32, 64, 128 and from then on 256 between two trials.
    assert verified(account, 16 + 1 + 32 + 1 + 64 + 1 + 128 + 1, 8, 0) == 4
    assert verified(account, 10 * (MAX_BACKOFF_DRAFTS + 1), 8, 0) == 10


def test_a_board_that_hardly_drafts_any_more_is_tried_in_time() -> None:
    now = 0.0
    account = DraftCircuitBreaker(lambda: now)
    verified(account, 1000, 8, 0)
    assert account.is_open and not account.allows_draft()
    now = 31.0
    assert account.allows_draft()
    assert not account.allows_draft()


def test_one_good_draft_brings_a_board_back() -> None:
    account = DraftCircuitBreaker(lambda: 0.0)
    verified(account, WINDOW_ROUNDS, 8, 0)
    assert verified(account, MIN_BACKOFF_DRAFTS + 1, 8, 5) == 1
    assert not account.is_open
    assert verified(account, 1000, 8, 5) == 1000


def test_a_board_that_matches_once_in_a_while_is_held_by_its_average() -> None:
    account = DraftCircuitBreaker(lambda: 0.0)
    trials = 0
    for index in range(20_000):
        if account.allows_draft():
            trials += 1
            # Good once on every hundredth draft: a share of 0.0025, far below what a row costs.
            account.record(4, int(trials % 100 == 0))
        assert index < 2000 or trials < 0.2 * index
    assert account.is_open


@pytest.mark.parametrize(("rows", "chance"), [(1, 0.1), (5, 0.3), (4, 0.5), (32, 0.8), (71, 0.8)])
def test_honest_boards_are_never_held(rows: int, chance: float) -> None:
    """Drafts whose every token survives with this chance, siblings counted: none is ever ignored, in 20,000 rounds."""
    account, noise = DraftCircuitBreaker(lambda: 0.0), random.Random(3)
    for _ in range(20_000):
        assert account.allows_draft()
        gained = sum(1 for _ in itertools.takewhile(lambda _: noise.random() < chance, range(min(rows, 32))))
        account.record(rows, gained)


def test_a_few_bad_drafts_prove_nothing() -> None:
    account = DraftCircuitBreaker(lambda: 0.0)
    assert verified(account, 90, 1, 0) == 90
    assert not account.is_open


def test_a_bucket_gives_its_rate_in_the_long_run_and_a_burst_after_a_silence() -> None:
    now = 0.0
    bucket = TokenBucket(4.0, lambda: now)
    bucket.take(4 * BURST_SECONDS + 8)
    assert bucket.wait_seconds == pytest.approx(2.0)
    now = 1.5
    assert bucket.wait_seconds == pytest.approx(0.5)
    now = 2.5
    assert bucket.wait_seconds == 0
    now = 1e6
    bucket.take(4 * BURST_SECONDS + 1)
    assert bucket.wait_seconds == pytest.approx(0.25)


def test_what_a_prompt_costs_and_a_limit_that_changes() -> None:
    slow = Principal("", tokens_per_second=1.0, name="slow")
    account = PrincipalAccount(slow)
    account.charge(0, 159)
    account.check_rate()
    account.charge(0, 16)
    with pytest.raises(VerifierRefused, match="wait"):
        account.check_rate()
    account.update_limits(Principal("", tokens_per_second=100.0, name="slow"))
    account.check_rate()
    account.charge(10**9)
    account.update_limits(Principal("", name="slow"))
    account.check_rate()


# Over HTTP


def value(url: str, name: str) -> float:
    """Of a metric, all labels together."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert values, name
    return sum(values)


def test_ignored_drafts_change_no_text_and_a_board_that_recovers_is_served_again(tiny: Target, alone: Alone) -> None:
    truth = alone(PROMPT, 260, ENDLESS)

    def wrong(at: int) -> list[int]:
        return [(truth[at] + 1) % 300] * 8

    with running(tiny) as url, ProtocolClient(url) as talker:
        session = talker.open(sampling=ENDLESS)
        for _ in range(WINDOW_ROUNDS):
            session.play(draft=wrong(len(session.ids) - 4))
        assert value(url, "flexspec_spec_decode_num_drafts_total") == WINDOW_ROUNDS
        for _ in range(MIN_BACKOFF_DRAFTS):
            # Right as they are, nobody looks at them: accepted is 0, and the target's own token comes as always.
            known = len(session.ids) - 4
            frame = session.play(draft=truth[known : known + 4], n=2)
            assert (frame.accepted, frame.tokens) == (0, truth[known : known + 2])
        assert value(url, "flexspec_drafts_ignored_total") == MIN_BACKOFF_DRAFTS
        # A repeated round is still the same round.
        assert talker.post(session.path, session.next(round=session.number)).status_code == 409
        for _ in range(10):
            known = len(session.ids) - 4
            assert session.play(draft=truth[known : known + 4]).accepted == 4
        assert session.ids == PROMPT + truth[: len(session.ids) - 4]


def test_an_ignored_round_is_answered_again_as_it_was(tiny: Target, alone: Alone) -> None:
    truth = alone(PROMPT, 60, ENDLESS)
    with running(tiny) as url, ProtocolClient(url) as talker:
        session = talker.open(sampling=ENDLESS)
        for _ in range(WINDOW_ROUNDS):
            session.play(draft=[(truth[len(session.ids) - 4] + 1) % 300] * 8)
        request = session.next(draft=truth[len(session.ids) - 4 :][:3], siblings={0: [7]})
        first, again = talker.post(session.path, request), talker.post(session.path, request)
        assert first.content == again.content
        session.play(draft=request.draft, siblings=request.siblings)
        assert session.frame.accepted == 0


def test_a_principals_new_session_is_no_way_around_its_books(tiny: Target, alone: Alone, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(f"[bad]\nsha256 = '{hash_token('bad')}'\n[good]\nsha256 = '{hash_token('good')}'\n")
    truth = alone(PROMPT, 60, ENDLESS)
    with (
        running(tiny, authenticator=Authenticator(file)) as url,
        ProtocolClient(url, token="bad") as bad,
        ProtocolClient(url, token="good") as good,
    ):
        for _ in range(4):
            session = bad.open(sampling=ENDLESS)
            for _ in range(WINDOW_ROUNDS // 4):
                session.play(draft=[(truth[len(session.ids) - 4] + 1) % 300] * 8)
        assert bad.open(sampling=ENDLESS, draft=truth[:4]).frame.accepted == 0
        assert good.open(sampling=ENDLESS, draft=truth[:4]).frame.accepted == 4
