"""Generation across the loss of the verifier: what is shown meanwhile, and that the text is the target's."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding import offline
from edge_runtime.decoding.generation import Generation, VerifiedTokens
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner, OnLinkLoss, Plan
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import serving
from tests.edge_runtime.service.conftest import RestartableVerifier

TEXT = "def read_config(path):\n"
TOKENS = 96
LONG = 300
GREEDY = Sampling(ignore_eos=True)
SAMPLED = Sampling(1.0, seed=4, ignore_eos=True, repetition_penalty=1.05, frequency_penalty=0.1, min_p=0.01)
PLANS = [FIXED_PLAN, Plan(0, continuation=24, shadow=True), Plan(2, draft_ahead=3, in_flight=2)]


@pytest.fixture
async def verifier(target_v1: Target) -> AsyncIterator[RestartableVerifier]:
    verifier = RestartableVerifier(target_v1)
    await verifier.start()
    yield verifier
    await verifier.stop()


def generation(
    draft: OnnxDraft | None,
    client: VerifierClient,
    on_link_loss: OnLinkLoss,
    sampling: Sampling,
    *,
    plan: Plan = FIXED_PLAN,
    tokens: int = TOKENS,
    prompt: list[int] | None = None,
) -> Generation:
    ids = prompt or (draft.tokenizer.encode(TEXT).ids if draft else [5, 6, 7])
    planner = FixedPlanner(plan)
    return Generation(draft, client, ids, sampling, max_new_tokens=tokens, planner=planner, on_link_loss=on_link_loss)


async def target_text(
    verifier: RestartableVerifier, draft: OnnxDraft, sampling: Sampling, tokens: int = TOKENS
) -> list[int]:
    async with VerifierClient(verifier.url) as client:
        plain = generation(draft, client, "wait", sampling, tokens=tokens)
        async for _ in plain:
            pass
        return plain.ids


class TextAssembler:
    """Assembles the text from its pieces, as a client does."""

    def __init__(self, prompt: list[int]) -> None:
        self.verified = list(prompt)
        self.tail: list[int] = []
        self.longest_tail = 0

    def read(self, piece: VerifiedTokens) -> None:
        self.verified += piece.accepted + piece.own
        self.tail = piece.unverified
        self.longest_tail = max(self.longest_tail, len(self.tail))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "sampling"),
    [(PLANS[0], SAMPLED), (PLANS[1], GREEDY), (PLANS[2], GREEDY)],
    ids=["drafted", "streamed", "early"],
)
async def test_offline_tokens_are_verified_when_the_link_is_back(
    verifier: RestartableVerifier,
    shipped_draft: OnnxDraft,
    sampling: Sampling,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Offline drafting must not finish the text before the link is back.
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    wanted = await target_text(verifier, shipped_draft, sampling, LONG)
    async with VerifierClient(verifier.url) as client:
        answer = generation(shipped_draft, client, "draft", sampling, plan=plan, tokens=LONG)
        reader = TextAssembler(answer.ids)
        steps = iter([verifier.stop, verifier.start])
        async for piece in answer:
            reader.read(piece)
            assert verifier.is_running or not piece.unverified or not piece.accepted + piece.own
            if answer.statistics.tokens >= 20 and (verifier.is_running or len(piece.unverified) >= 24):
                for step in itertools.islice(steps, 1):
                    await step()
        assert reader.verified == answer.ids == wanted
        assert reader.tail == answer.unverified == []
        assert reader.longest_tail >= 24
        assert answer.statistics.unverified == 0
        assert answer.statistics.recoveries == 1
        assert answer.statistics.withdrawn <= reader.longest_tail
        assert answer.statistics.withdrawn > 0 or not sampling.temperature
        assert answer.finish == "length"


@pytest.mark.slow
async def test_without_a_verifier_the_rest_stays_unverified(
    verifier: RestartableVerifier, shipped_draft: OnnxDraft
) -> None:
    sampling = Sampling(ignore_eos=True)
    wanted = await target_text(verifier, shipped_draft, sampling)
    async with VerifierClient(verifier.url) as client:
        answer = generation(shipped_draft, client, "draft", sampling)
        reader = TextAssembler(answer.ids)
        async for piece in answer:
            reader.read(piece)
            if answer.statistics.tokens >= 20:
                await verifier.stop()
    prompt = len(shipped_draft.tokenizer.encode(TEXT).ids)
    assert answer.finish == "length"
    assert answer.ids == reader.verified == wanted[: len(answer.ids)]
    assert len(answer.ids) + len(answer.unverified) == prompt + TOKENS
    assert answer.unverified == reader.tail
    assert answer.statistics.unverified == len(answer.unverified) > 0
    assert answer.statistics.tokens == len(answer.ids) - prompt


@pytest.mark.slow
async def test_an_offline_draft_ends_the_text_itself(shipped_draft: OnnxDraft) -> None:
    """No verifier was ever reached: every token is the draft's, and a special token ends the text."""
    async with VerifierClient("http://127.0.0.1:9", deadline=60.0) as client:
        answer = generation(shipped_draft, client, "draft", Sampling(1.0, seed=1), tokens=400)
        async for piece in answer:
            assert piece.unverified
    special = set(shipped_draft.manifest.vocabulary.special_ids.values())
    assert answer.version == ""
    assert (answer.finish == "stop") == (answer.unverified[-1] in special)
    assert not special & set(answer.unverified[:-1])
    assert answer.finish == "stop" or len(answer.unverified) == 400


@pytest.mark.slow
async def test_waiting_continues_the_text(verifier: RestartableVerifier, shipped_draft: OnnxDraft) -> None:
    sampling = Sampling(0.7, seed=3, ignore_eos=True)
    wanted = await target_text(verifier, shipped_draft, sampling)
    async with VerifierClient(verifier.url, deadline=60.0) as client:
        answer = generation(shipped_draft, client, "wait", sampling)
        restart: asyncio.Task[None] | None = None
        async for piece in answer:
            assert not piece.unverified
            if restart is None and answer.statistics.tokens >= 20:
                await verifier.stop()
                restart = asyncio.create_task(_start_after(1.0, verifier))
        assert answer.ids == wanted
        assert answer.statistics.recoveries == 1


async def _start_after(seconds: float, verifier: RestartableVerifier) -> None:
    await asyncio.sleep(seconds)
    await verifier.start()


async def test_failing_does_not_wait(verifier: RestartableVerifier, shipped_draft: OnnxDraft) -> None:
    async with VerifierClient(verifier.url, deadline=600.0) as client:
        answer = generation(shipped_draft, client, "fail", Sampling(ignore_eos=True))
        with pytest.raises(VerifierUnreachable) as caught:
            async with asyncio.timeout(300.0):
                async for _ in answer:
                    await verifier.stop()
    assert caught.value.fault == "connection_refused"


@pytest.mark.slow
async def test_a_slow_verifier_is_not_a_lost_link(target_v1: Target, shipped_draft: OnnxDraft) -> None:
    """A verifier that acknowledges its input but replies late does not trigger offline drafting."""
    async with serving(target_v1) as server, VerifierClient(server.url) as client:
        scheduler = server.service.scheduler
        answer = generation(shipped_draft, client, "draft", Sampling(ignore_eos=True), tokens=12)
        submit = scheduler.submit

        def slow(*arguments: object) -> None:
            asyncio.get_running_loop().call_later(0.9, submit, *arguments)

        scheduler.submit = slow
        async for piece in answer:
            assert not piece.unverified
    assert answer.statistics.tokens == 12


@pytest.mark.slow
async def test_cancelling_during_offline_drafting(verifier: RestartableVerifier, shipped_draft: OnnxDraft) -> None:
    async with VerifierClient(verifier.url) as client:
        answer = generation(shipped_draft, client, "draft", Sampling(ignore_eos=True))
        async with contextlib.aclosing(aiter(answer)) as pieces:
            async for piece in pieces:
                if piece.unverified:
                    break
                await verifier.stop()
        await verifier.start()
        again = generation(shipped_draft, client, "draft", Sampling(ignore_eos=True), tokens=4)
        async for _ in again:
            pass
        assert again.statistics.tokens + len(again.unverified) == 4
