"""The batch scheduler: order of its steps, failures, lack of memory, and versions that are loaded and unloaded."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from cloud_verifier.engine import scheduler as scheduler_module
from cloud_verifier.engine.sessions import RoundReply
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import KVCacheFull
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError, VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.engine.recording_target import ENDLESS, RecordingTarget, running_scheduler, submit_opening
from tests.cloud_verifier.model.test_runner import save_lora_adapter
from tests.cloud_verifier.protocol_client import PROMPT, TIMEOUT_SECONDS
from tests.models import VOCABULARY_SIZE


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
