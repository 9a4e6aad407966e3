"""The batch scheduler: batching, prefill in chunks, failures, and versions that are loaded and unloaded."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from cloud_verifier.engine import scheduler as scheduler_module
from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.kv_cache import KVCacheFull, KVCachePool
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError, VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.model.test_runner import save_lora_adapter
from tests.cloud_verifier.protocol_client import GREEDY, PROMPT, TIMEOUT_SECONDS
from tests.models import VOCABULARY_SIZE

ENDLESS = Sampling(ignore_eos=True)


class RecordingTarget(Target):
    """A copy of a loaded target that records its forwards, and can be held before the next one or made to fail."""

    def __init__(self, target: Target) -> None:
        vars(self).update(vars(target))
        self.forwards: list[list[int]] = []
        self.continued: list[bool] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.fails: Callable[[Segment], bool] = lambda piece: False
        self.fails_together = False
        self.failure: Exception = RuntimeError("injected failure")

    def run(
        self,
        pool: KVCachePool,
        pieces: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        meanwhile()
        self.may_run.wait(TIMEOUT_SECONDS)
        if any(map(self.fails, pieces)) or (self.fails_together and len(pieces) > 1):
            raise self.failure
        self.forwards.append([len(piece) for piece in pieces])
        self.continued.append(continues)
        return super().run(pool, pieces)


@asynccontextmanager
async def running_scheduler(target: Target, **options: Any) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(lambda: target, lambda _: None, lambda: 0, **options)
    scheduler.start()
    while scheduler.target is None:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    try:
        yield scheduler
    finally:
        await asyncio.to_thread(scheduler.stop)


def submit_opening(
    scheduler: Scheduler,
    target: Target,
    prompt: list[int] = PROMPT,
    sampling: Sampling = GREEDY,
    *,
    owner: str = "",
    **round: Any,
) -> tuple[Session, RoundReply]:
    """Submit the first round of a new session; returns the session and the reply."""
    reply = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, len(prompt), **round))
    session = Session(list(prompt), sampling, target, reply, owner)
    scheduler.submit(session, reply)
    return session, reply


async def test_waiting_rounds_share_a_forward(tiny: Target) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        replies = [
            submit_opening(scheduler, target, prompt=[7], draft=[5] * k, siblings={0: [9]} if k else {})[1]
            for k in range(5)
        ]
        await asyncio.sleep(0.1)
        target.may_run.set()
        for reply in replies:
            await reply.result()
        # The first forward may have started before the others were submitted.
        assert len(target.forwards) <= 2
        assert sorted(rows for forward in target.forwards for rows in forward) == [1, 3, 4, 5, 6]


async def test_frames_are_handed_over_while_the_next_forward_runs(tiny: Target) -> None:
    target = RecordingTarget(tiny)

    def hold_the_next_forward(_: Segment) -> bool:
        target.may_run.clear()
        return False

    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        _, short = submit_opening(scheduler, target, prompt=[7])
        _, long = submit_opening(scheduler, target, prompt=[9], n=3)
        target.fails = hold_the_next_forward
        target.may_run.set()
        await asyncio.wait_for(short.result(), TIMEOUT_SECONDS)
        assert not long.done
        target.fails = lambda piece: False
        target.may_run.set()
        await long.result()


async def test_new_rounds_and_tasks_wait_for_the_forward_that_is_computed_ahead(
    tiny: Target, reference_text: ReferenceText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.runner, "runs_ahead", True)
    target = RecordingTarget(tiny)

    def arrive(_: Segment) -> bool:
        """Submit a round, and a task, during the third forward."""
        if len(target.forwards) == 2 and not later:
            loop.call_soon_threadsafe(lambda: later.append(submit_opening(scheduler, target, prompt=[3], n=2)[1]))
            tasks.append(asyncio.run_coroutine_threadsafe(scheduler.unload("another version"), loop))
            while not later or not scheduler._tasks:
                time.sleep(0.001)
        return False

    loop, later, tasks = asyncio.get_running_loop(), list[RoundReply](), list[Any]()
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        streams = [submit_opening(scheduler, target, prompt=[token], n=8)[1] for token in (7, 9)]
        target.fails = arrive
        target.may_run.set()
        for token, stream in zip((7, 9), streams, strict=True):
            assert (await stream.result()).tokens == reference_text([token], 8)
        assert (await later[0].result()).tokens == reference_text([3], 2)
        await asyncio.wrap_future(tasks[0])
    # The third forward was launched with the fourth, for which the arrivals wait.
    assert [len(forward) for forward in target.forwards[2:5]] == [2, 2, 3]
    assert target.continued[2:4] == [True, False]
    assert target.continued[-2:] == [True, False]


async def test_a_long_prompt_does_not_delay_other_rounds(tiny: Target, reference_text: ReferenceText) -> None:
    target = RecordingTarget(tiny)
    prompt = [(7 * i + 3) % VOCABULARY_SIZE for i in range(500)]
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        _, long = submit_opening(scheduler, target, prompt=prompt)
        _, short = submit_opening(scheduler, target, prompt=[7], n=3)
        target.may_run.set()
        assert (await short.result()).tokens == reference_text([7], 3)
        assert (await long.result()).tokens == reference_text(prompt, 1)
    assert all(sum(forward) <= target.runner.max_prefill_rows + 1 for forward in target.forwards)
    # The three tokens of the short text came from forwards that also prefilled a part of the prompt.
    assert [len(forward) for forward in target.forwards].count(2) >= 2


async def test_prompts_of_principals_are_prefilled_in_turns(tiny: Target) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target, reuse_prefixes=False) as scheduler:
        target.may_run.clear()
        long = [(7 * i + 3) % VOCABULARY_SIZE for i in range(500)]
        flood = [submit_opening(scheduler, target, prompt=long, owner="flood")[1] for _ in range(8)]
        _, small = submit_opening(scheduler, target, prompt=long, owner="small")
        target.may_run.set()
        await small.result()
        # It has had every second turn, and not its share of nine prompts.
        assert sum(reply.done for reply in flood) <= 1
        await asyncio.gather(*(reply.result() for reply in flood))


async def test_a_round_waits_for_memory_of_the_cache(tiny: Target, reference_text: ReferenceText) -> None:
    target = RecordingTarget(tiny)
    target.failure = KVCacheFull()
    async with running_scheduler(target) as scheduler:
        waiting_session, waiting = submit_opening(scheduler, target, prompt=[7], n=3)
        target.fails = lambda piece: piece.sequence is waiting_session.cache
        _, other = submit_opening(scheduler, target, n=5)
        assert (await other.result()).tokens == reference_text(PROMPT, 5)
        assert not waiting.done
        target.fails = lambda piece: False
        assert (await waiting.result()).tokens == reference_text([7], 3)


async def test_a_round_does_not_wait_for_memory_for_ever(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "CACHE_WAIT_SECONDS", 0.02)
    target = RecordingTarget(tiny)
    target.failure, target.fails = KVCacheFull(), lambda piece: True
    async with running_scheduler(target) as scheduler:
        session, reply = submit_opening(scheduler, target)
        with pytest.raises(VerifierRefused, match="the KV cache is full") as caught:
            await reply.result()
        assert (caught.value.code, session.closed) == (ErrorCode.OVERLOADED, True)


@pytest.mark.slow
async def test_a_forward_waits_for_sessions_that_are_expected(tiny: Target) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target, window=3600.0) as scheduler:
        sessions = [submit_opening(scheduler, target, sampling=ENDLESS) for _ in range(3)]
        for _, reply in sessions:
            await reply.result()

        async def run_round(session: Session, number: int, pause: float) -> None:
            await asyncio.sleep(pause)
            reply = session.begin_round(RoundRequest(PROTOCOL_VERSION, number, len(session.ids), draft=[5]))
            scheduler.submit(session, reply)
            await reply.result()

        # The scheduler learns that the rounds arrive 50 ms apart; a busy machine makes some of them later.
        for number in range(1, 50):
            before = len(target.forwards)
            await asyncio.gather(*(run_round(session, number, 0.05 * i) for i, (session, _) in enumerate(sessions)))
            # Without waiting there would be three.
            if len(target.forwards) - before < 3:
                break
        else:
            pytest.fail("no rounds share a forward")
        # A session that does not come back is waited for once, and only until it is late.
        await asyncio.wait_for(run_round(sessions[0][0], number + 1, 0.0), TIMEOUT_SECONDS)


async def test_a_failing_round_does_not_harm_others_in_its_forward(tiny: Target, reference_text: ReferenceText) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        target.fails = lambda piece: 13 in piece.ids
        good = [submit_opening(scheduler, target, draft=[k])[1] for k in range(3)]
        bad, reply = submit_opening(scheduler, target, draft=[13])
        target.may_run.set()
        with pytest.raises(VerifierRefused, match="the round failed"):
            await reply.result()
        assert bad.closed
        for k, each in enumerate(good):
            frame = await each.result()
            assert ([k] * frame.accepted + frame.tokens)[0] == reference_text(PROMPT, 1)[0]
        # The scheduler is still running.
        assert (await submit_opening(scheduler, target)[1].result()).tokens == reference_text(PROMPT, 1)


async def test_a_forward_without_memory_is_typed_and_the_engine_goes_on(
    tiny: Target, reference_text: ReferenceText
) -> None:
    target = RecordingTarget(tiny)
    target.failure = torch.OutOfMemoryError("injected")
    async with running_scheduler(target) as scheduler:
        # What two rounds together have no memory for, each has alone.
        target.may_run.clear()
        target.fails_together = True
        replies = [submit_opening(scheduler, target, draft=[k])[1] for k in range(3)]
        target.may_run.set()
        for k, reply in enumerate(replies):
            frame = await reply.result()
            assert ([k] * frame.accepted + frame.tokens)[0] == reference_text(PROMPT, 1)[0]
        target.fails = lambda piece: True
        session, reply = submit_opening(scheduler, target)
        with pytest.raises(VerifierRefused, match="ran out of memory") as refused:
            await reply.result()
        assert refused.value.code == ErrorCode.OVERLOADED and session.closed
        target.fails = lambda piece: False
        assert (await submit_opening(scheduler, target)[1].result()).tokens == reference_text(PROMPT, 1)


async def test_rounds_on_a_lost_device_are_answered_and_the_engine_ends(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = RecordingTarget(tiny)
    monkeypatch.setattr(scheduler_module, "device_responds", lambda device: False)
    async with running_scheduler(target) as scheduler:
        target.fails = lambda piece: 13 in piece.ids
        # Two that are long under way when the third one fails, whatever is computed first.
        replies = [submit_opening(scheduler, target, sampling=ENDLESS, n=100)[1] for _ in range(2)]
        replies.append(submit_opening(scheduler, target, draft=[13])[1])
        for reply in replies:
            with pytest.raises(VerifierRefused, match="it is going to restart") as refused:
                await reply.result()
            assert refused.value.code == ErrorCode.INTERNAL
        assert isinstance(scheduler.failure, scheduler_module.DeviceLostError)
        scheduler._thread.join(TIMEOUT_SECONDS)
        assert scheduler.stalled_seconds == float("inf")
        with pytest.raises(VerifierRefused, match="it is going to restart"):
            await submit_opening(scheduler, target)[1].result()


async def test_cache_pages_of_closed_sessions_are_reused(tiny: Target) -> None:
    async with running_scheduler(tiny) as scheduler:
        for _ in range(5):
            session, reply = submit_opening(scheduler, tiny)
            await reply.result()
            scheduler.release(session)
        (pool,) = scheduler._caches.pools
        assert len(pool.slabs) <= 2


async def test_memory_of_closed_sessions_goes_back(tiny: Target, reference_text: ReferenceText) -> None:
    async with running_scheduler(tiny) as scheduler:
        for _ in range(2):
            opened = [submit_opening(scheduler, tiny, prompt=[*PROMPT, k]) for k in range(8)]
            for session, reply in opened:
                await reply.result()
                scheduler.release(session)
            (pool,) = scheduler._caches.pools
            await scheduler.release_unused_memory(300.0)
            assert scheduler.retained_tokens and any(slab.numel() for slab in pool.slabs)
            # The pages that become free by the first call were not needed until the second.
            for _ in range(2):
                await scheduler.release_unused_memory(0.0)
            assert not scheduler.retained_tokens and not any(slab.numel() for slab in pool.slabs)
        assert (await submit_opening(scheduler, tiny)[1].result()).tokens == reference_text(PROMPT, 1)


@pytest.mark.slow
async def test_no_text_depends_on_the_batch_it_is_computed_in(tiny_path: Path, tmp_path: Path) -> None:
    """Texts of three versions are decoded, evicted and reopened while another version is loaded and unloaded."""
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    paths = {
        name: save_lora_adapter(tiny_path, tmp_path / name, seed)
        for seed, name in enumerate(("one", "two", "three"), 1)
    }
    models = {name: load_model(path, "cpu", "float32")[0] for name, path in [("tiny", tiny_path), *paths.items()]}
    samplings = [ENDLESS, Sampling(0.7, seed=3, ignore_eos=True), Sampling(1.0, top_p=0.9, seed=4, ignore_eos=True)]

    def make(path: Path, name: str, others: list[Target]) -> Target:
        return Target(path, device="cpu", dtype=torch.float32, name=name, share_with=others)

    async with running_scheduler(base, target_factory=make) as scheduler:
        targets = {
            "tiny": base,
            "one": await scheduler.load(paths["one"], "one"),
            "two": await scheduler.load(paths["two"], "two"),
        }
        assert {id(target.runner) for target in targets.values()} == {id(base.runner)}
        done = asyncio.Event()

        async def load_and_unload() -> None:
            while not done.is_set():
                third = await scheduler.load(paths["three"], "three")
                _, reply = submit_opening(scheduler, third, n=5, sampling=ENDLESS)
                assert (await reply.result()).tokens == generate_reference(
                    models["three"], PROMPT, ENDLESS, 5, frozenset()
                )
                await scheduler.unload(third.version)

        async def decode(seed: int) -> None:
            random = Random(seed)
            name, sampling = random.choice(list(targets)), random.choice(samplings)
            prompt = [random.randrange(1, VOCABULARY_SIZE) for _ in range(random.choice([1, 5, 200]))]
            count = random.randint(5, 40)
            truth = generate_reference(models[name], prompt, sampling, count + 40, frozenset())
            generated: list[int] = []
            session, reply = submit_opening(
                scheduler, targets[name], prompt=prompt, sampling=sampling, n=random.choice([1, 4])
            )
            while True:
                frame = await reply.result()
                generated += reply.request.draft[: frame.accepted] + frame.tokens
                if len(generated) >= count:
                    break
                if random.random() < 0.1:
                    # Evicted: the text continues in another session.
                    scheduler.release(session)
                    session.closed = True
                    session, reply = submit_opening(
                        scheduler, targets[name], prompt=[*prompt, *generated], sampling=sampling
                    )
                    continue
                draft = [
                    token if random.random() < 0.7 else random.randrange(VOCABULARY_SIZE)
                    for token in truth[len(generated) : len(generated) + random.randint(0, 8)]
                ]
                siblings = {i: [truth[len(generated) + i], 5] for i in range(len(draft)) if random.random() < 0.3}
                number = reply.request.round + 1
                reply = session.begin_round(
                    RoundRequest(
                        PROTOCOL_VERSION,
                        number,
                        len(prompt) + len(generated),
                        draft=draft,
                        siblings=siblings,
                        n=random.choice([1, 1, 6]),
                    )
                )
                scheduler.submit(session, reply)
                await asyncio.sleep(random.choice([0, 0, 0.003]))
            assert generated == truth[: len(generated)]
            session.closed = True
            scheduler.release(session)

        rollout = asyncio.create_task(load_and_unload())
        for start in range(0, 36, 12):
            await asyncio.gather(*(decode(seed) for seed in range(start, start + 12)))
        done.set()
        await rollout
        assert set(scheduler.versions) == {target.version for target in targets.values()}


async def test_a_version_that_does_not_load_changes_nothing(
    tiny: Target, tmp_path: Path, reference_text: ReferenceText
) -> None:
    def make(path: Path, name: str, others: list[Target]) -> Target:
        return Target(path, device="cpu", dtype=torch.float32, name=name, share_with=others)

    async with running_scheduler(tiny, target_factory=make) as scheduler:
        with pytest.raises(TargetError, match="nowhere"):
            await scheduler.load(tmp_path / "nowhere", "nowhere")
        assert list(scheduler.versions) == [tiny.version]
        assert (await submit_opening(scheduler, tiny)[1].result()).tokens == reference_text(PROMPT, 1)
