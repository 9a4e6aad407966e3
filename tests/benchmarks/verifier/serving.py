"""The engine: streams, boards' drafts, and streams beside long prompts that arrive without end."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from rich.table import Table

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.target import Target
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.verifier.measuring import percentile, report
from tests.benchmarks.verifier.random_models import RandomTarget, start_engine


async def stream_text(
    engine: Scheduler,
    target: Target,
    prompt: list[int],
    tokens: int,
    gaps: list[float],
    waits: list[float] | None = None,
) -> float:
    """Stream a text; returns the seconds to its first token.

    Args:
        gaps: gets the seconds between frames, divided by the tokens of the later one.
        waits: gets the same, undivided.
    """
    request = RoundRequest(PROTOCOL_VERSION, 0, len(prompt), n=tokens, stream=True)
    reply = RoundReply(request)
    started = time.perf_counter()
    session = Session(list(prompt), Sampling(1.0, seed=len(gaps), ignore_eos=True), target, reply)
    engine.submit(session, reply)
    first = last = 0.0
    async for frame in reply.frames():
        now = time.perf_counter()
        if not first:
            first = now - started
        else:
            gaps += [(now - last) / len(frame.tokens)] * len(frame.tokens)
            if waits is not None:
                waits.append(now - last)
        last = now
    engine.release(session)
    return first


async def generate_text(
    engine: Scheduler,
    target: Target,
    prompt: list[int],
    sampling: Sampling,
    count: int,
    draft: int,
    seed: int,
    expected: Sequence[int] = (),
) -> tuple[list[int], list[tuple[int, float]]]:
    """Generate a text as a board would, with 4 of 5 draft tokens right. Return it and its close calls."""
    random = Random(seed)
    request = RoundRequest(PROTOCOL_VERSION, 0, len(prompt), n=1 if draft else 16)
    answer = RoundReply(request)
    session = Session(list(prompt), sampling, target, answer)
    new: list[int] = []
    calls: list[tuple[int, float]] = []
    number = 0
    while True:
        engine.submit(session, answer)
        frame = await answer.result()
        new += answer.request.draft[: frame.accepted] + frame.tokens
        calls += frame.close_calls
        if len(new) >= count or frame.finish:
            engine.release(session)
            return new[:count], calls
        number += 1
        correct = expected[len(new) : len(new) + draft]
        guesses = [token if random.random() < 0.8 else random.randrange(target.vocabulary_size) for token in correct]
        n = 1 if draft else min(16, count - len(new))
        answer = session.begin_round(RoundRequest(PROTOCOL_VERSION, number, len(prompt) + len(new), draft=guesses, n=n))


def serving(options: argparse.Namespace) -> None:
    table = Table(title=f"the engine, {options.shape[0]}, bfloat16" + (", compiled" if options.compiled else ""))
    for column in ("what", "streams", "tokens/s", "first token p50 / p99, ms", "token p50 / p99, ms"):
        table.add_column(column, justify="right")
    started = time.perf_counter()
    target = RandomTarget(options.shape[0], compiled=options.compiled)
    engine = Scheduler(lambda: target, lambda _: None, lambda: 0, cache_tokens=0, reuse_prefixes=False)
    random, length = Random(1), options.prompt

    def make_prompt(tokens: int) -> list[int]:
        return [random.randrange(target.vocabulary_size) for _ in range(tokens)]

    async def measure() -> None:
        await start_engine(engine)
        print(f"ready in {time.perf_counter() - started:.1f} s, the model's construction included", flush=True)
        await stream_text(engine, target, make_prompt(length), 16, [])

        async def stream(count: int, what: str) -> None:
            gaps: list[float] = []
            begin = time.perf_counter()
            texts = (stream_text(engine, target, make_prompt(length), options.tokens, gaps) for _ in range(count))
            firsts = await asyncio.gather(*texts)
            rate = count * options.tokens / (time.perf_counter() - begin)
            shown = (
                f"{1e3 * percentile(each, 0.5):.1f} / {1e3 * percentile(each, 0.99):.1f}" for each in (firsts, gaps)
            )
            table.add_row(what, str(count), f"{rate:.0f}", *shown)

        for count in options.streams:
            await stream(count, "streaming")
        for count in options.streams:
            jobs = [(make_prompt(length), Sampling(1.0, seed=seed, ignore_eos=True)) for seed in range(count)]

            async def play(draft: int, expected: Any, jobs: Any = jobs) -> Any:
                texts = (
                    generate_text(
                        engine, target, *job, options.tokens, draft, index, expected[index] if expected else ()
                    )
                    for index, job in enumerate(jobs)
                )
                return await asyncio.gather(*texts)

            expected = [new for new, _ in await play(0, None)]
            begin = time.perf_counter()
            await play(5, expected)
            rate = count * options.tokens / (time.perf_counter() - begin)
            table.add_row("boards draft, K=5, 4 of 5 right", str(count), f"{rate:.0f}", "", "")
        firsts: list[float] = []

        async def send_long_prompts() -> None:
            while True:
                firsts.append(await stream_text(engine, target, make_prompt(options.long_prompt), 1, []))

        sending = [asyncio.create_task(send_long_prompts()) for _ in range(2)]
        await stream(min(16, max(options.streams)), f"beside prompts of {options.long_prompt}")
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        if firsts:
            shown = f"{1e3 * percentile(firsts, 0.5):.0f} / {1e3 * percentile(firsts, 0.99):.0f}"
            table.add_row(f"these prompts of {options.long_prompt}", "2", "", shown, "")
        await asyncio.to_thread(engine.stop)

    asyncio.run(measure())
    report(table, options, cache_tokens=engine._cache_tokens)
