"""The engine: who shares a forward, who waits for whom, and that no text notices any of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import KVCachePool
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError, VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import Alone
from tests.cloud_verifier.model.test_runner import save_lora_adapter
from tests.cloud_verifier.protocol_client import GREEDY, PROMPT
from tests.models import VOCABULARY_SIZE

ENDLESS = Sampling(ignore_eos=True)


class Slow(Target):
    """A target, loaded already, that keeps what went into its forwards, and can be held up before the next one."""

    def __init__(self, target: Target) -> None:
        vars(self).update(vars(target))
        self.forwards: list[list[int]] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.fails: Callable[[Segment], bool] = lambda piece: False

    def run(self, pool: KVCachePool, pieces: Sequence[Segment]) -> list[SampledTokens | None]:
        self.may_run.wait(20)
        if any(map(self.fails, pieces)):
            raise RuntimeError("as the test wants it")
        self.forwards.append([len(piece) for piece in pieces])
        return super().run(pool, pieces)


@asynccontextmanager
async def engine_of(target: Target, **options: Any) -> AsyncIterator[Scheduler]:
    engine = Scheduler(lambda: target, lambda _: None, lambda: 0, **options)
    engine.start()
    while engine.target is None:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


def opened(engine: Scheduler, target: Target, prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, **round: Any):  # type: ignore[no-untyped-def]
    """A session whose first round is submitted; and its answer."""
    answer = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, len(prompt), **round))
    session = Session(list(prompt), sampling, target, answer)
    engine.submit(session, answer)
    return session, answer


async def test_rounds_that_wait_share_a_forward(tiny: Target) -> None:
    target = Slow(tiny)
    async with engine_of(target) as engine:
        target.may_run.clear()
        answers = [
            opened(engine, target, prompt=[7], draft=[5] * k, siblings={0: [9]} if k else {})[1] for k in range(5)
        ]
        await asyncio.sleep(0.1)
        target.may_run.set()
        for answer in answers:
            await answer.result()
        # One may have begun before the others came.
        assert len(target.forwards) <= 2
        assert sorted(rows for forward in target.forwards for rows in forward) == [1, 3, 4, 5, 6]


async def test_a_long_prompt_keeps_nobody_waiting(tiny: Target, alone: Alone) -> None:
    target = Slow(tiny)
    prompt = [(7 * i + 3) % VOCABULARY_SIZE for i in range(500)]
    async with engine_of(target) as engine:
        target.may_run.clear()
        _, long = opened(engine, target, prompt=prompt)
        _, short = opened(engine, target, prompt=[7], n=3)
        target.may_run.set()
        assert (await short.result()).tokens == alone([7], 3)
        assert (await long.result()).tokens == alone(prompt, 1)
    assert all(sum(forward) <= target.runner.max_prefill_rows + 1 for forward in target.forwards)
    # The short text's three tokens came in three of the forwards in which the prompt was read.
    assert [len(forward) for forward in target.forwards].count(2) >= 2


async def test_who_is_expected_is_waited_for(tiny: Target) -> None:
    target = Slow(tiny)
    async with engine_of(target, window=5.0) as engine:
        sessions = [opened(engine, target, sampling=ENDLESS) for _ in range(3)]
        for _, answer in sessions:
            await answer.result()

        async def play(session: Session, number: int, pause: float) -> None:
            await asyncio.sleep(pause)
            answer = session.begin_round(RoundRequest(PROTOCOL_VERSION, number, len(session.ids), draft=[5]))
            engine.submit(session, answer)
            await answer.result()

        for number in (1, 2, 3):
            before = len(target.forwards)
            await asyncio.gather(*(play(session, number, 0.05 * i) for i, (session, _) in enumerate(sessions)))
        # They come 50 ms apart, and by now the engine knows that: without waiting there would be three.
        assert len(target.forwards) - before < 3
        # Who does not come back is waited for once, and no longer than until he is late.
        await asyncio.wait_for(play(sessions[0][0], 4, 0.0), 2.0)


async def test_a_round_that_fails_harms_nobody_in_its_forward(tiny: Target, alone: Alone) -> None:
    target = Slow(tiny)
    async with engine_of(target) as engine:
        target.may_run.clear()
        target.fails = lambda piece: 13 in piece.ids
        good = [opened(engine, target, draft=[k])[1] for k in range(3)]
        bad, answer = opened(engine, target, draft=[13])
        target.may_run.set()
        with pytest.raises(VerifierRefused, match="the round failed"):
            await answer.result()
        assert bad.closed
        for k, each in enumerate(good):
            frame = await each.result()
            assert ([k] * frame.accepted + frame.tokens)[0] == alone(PROMPT, 1)[0]
        # And the engine lives.
        assert (await opened(engine, target)[1].result()).tokens == alone(PROMPT, 1)


async def test_pages_of_closed_sessions_are_used_again(tiny: Target) -> None:
    async with engine_of(tiny) as engine:
        for _ in range(5):
            session, answer = opened(engine, tiny)
            await answer.result()
            engine.release(session)
        (pool,) = engine._pools.values()
        assert len(pool.slabs) <= 2


@pytest.mark.slow
async def test_no_text_depends_on_its_company(tiny_path: Path, tmp_path: Path) -> None:
    """Texts of three versions come and go, are left and taken up again, while versions are loaded and retired."""
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    paths = {
        name: save_lora_adapter(tiny_path, tmp_path / name, seed)
        for seed, name in enumerate(("one", "two", "three"), 1)
    }
    models = {name: load_model(path, "cpu", "float32")[0] for name, path in [("tiny", tiny_path), *paths.items()]}
    samplings = [ENDLESS, Sampling(0.7, seed=3, ignore_eos=True), Sampling(1.0, top_p=0.9, seed=4, ignore_eos=True)]

    def make(path: Path, name: str, others: list[Target]) -> Target:
        return Target(path, device="cpu", dtype=torch.float32, name=name, share_with=others)

    async with engine_of(base, target_factory=make) as engine:
        ready = {
            "tiny": base,
            "one": await engine.load(paths["one"], "one"),
            "two": await engine.load(paths["two"], "two"),
        }
        assert {id(target.runner) for target in ready.values()} == {id(base.runner)}
        over = asyncio.Event()

        async def roll_out() -> None:
            while not over.is_set():
                third = await engine.load(paths["three"], "three")
                _, answer = opened(engine, third, n=5, sampling=ENDLESS)
                assert (await answer.result()).tokens == generate_reference(
                    models["three"], PROMPT, ENDLESS, 5, frozenset()
                )
                await engine.unload(third.version)

        async def write(seed: int) -> None:
            random = Random(seed)
            name, sampling = random.choice(list(ready)), random.choice(samplings)
            prompt = [random.randrange(1, VOCABULARY_SIZE) for _ in range(random.choice([1, 5, 200]))]
            count = random.randint(5, 40)
            truth = generate_reference(models[name], prompt, sampling, count + 40, frozenset())
            said: list[int] = []
            session, answer = opened(engine, ready[name], prompt=prompt, sampling=sampling, n=random.choice([1, 4]))
            while True:
                frame = await answer.result()
                said += answer.request.draft[: frame.accepted] + frame.tokens
                if len(said) >= count:
                    break
                if random.random() < 0.1:
                    # Evicted: all again, in another session.
                    engine.release(session)
                    session.closed = True
                    session, answer = opened(engine, ready[name], prompt=[*prompt, *said], sampling=sampling)
                    continue
                draft = [
                    token if random.random() < 0.7 else random.randrange(VOCABULARY_SIZE)
                    for token in truth[len(said) : len(said) + random.randint(0, 8)]
                ]
                siblings = {i: [truth[len(said) + i], 5] for i in range(len(draft)) if random.random() < 0.3}
                number = answer.request.round + 1
                answer = session.begin_round(
                    RoundRequest(
                        PROTOCOL_VERSION,
                        number,
                        len(prompt) + len(said),
                        draft=draft,
                        siblings=siblings,
                        n=random.choice([1, 1, 6]),
                    )
                )
                engine.submit(session, answer)
                await asyncio.sleep(random.choice([0, 0, 0.003]))
            assert said == truth[: len(said)]
            session.closed = True
            engine.release(session)

        rolling = asyncio.create_task(roll_out())
        for start in range(0, 60, 12):
            await asyncio.gather(*(write(seed) for seed in range(start, start + 12)))
        over.set()
        await rolling
        assert set(engine.versions) == {target.version for target in ready.values()}


async def test_a_version_that_does_not_load_changes_nothing(tiny: Target, tmp_path: Path, alone: Alone) -> None:
    def make(path: Path, name: str, others: list[Target]) -> Target:
        return Target(path, device="cpu", dtype=torch.float32, name=name, share_with=others)

    async with engine_of(tiny, target_factory=make) as engine:
        with pytest.raises(TargetError, match="nowhere"):
            await engine.load(tmp_path / "nowhere", "nowhere")
        assert list(engine.versions) == [tiny.version]
        assert (await opened(engine, tiny)[1].result()).tokens == alone(PROMPT, 1)
