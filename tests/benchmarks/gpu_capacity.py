"""Boards that one GPU serves at a latency goal: `python -m tests.benchmarks.gpu_capacity --shape 8B`.

The engine with a target of a real shape and random weights, without HTTP: N boards that only stream, and N boards that
draft and pause between their rounds as long as drafting and the link take. First all prompts are prefilled; then the
time per token of each board is measured, and the 95th percentile over the boards is compared with the goals. At a high
temperature the noise decides alone, so that the right drafts are known, and a set share of draft tokens is right.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

from rich.table import Table

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.target import Target
from edge_runtime.protocol.messages import PROTOCOL_VERSION, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.verifier.measuring import percentile, report
from tests.benchmarks.verifier.random_models import SHAPES, RandomTarget, start_engine

# So high that hardly a logit counts beside the noise.
TEMPERATURE = 100.0


class Drafting(NamedTuple):
    """How a board drafts.

    Attributes:
        draft: tokens of a draft; 0 to stream.
        accuracy: share of draft tokens that are right.
        pause: seconds between a frame and the next round.
    """

    draft: int
    accuracy: float
    pause: float


class TimedAnswer(NamedTuple):
    """Tokens of one answer, and the seconds from its first token to its last, for each token after the first."""

    tokens: list[int]
    seconds_per_token: float


async def last_frame(reply: RoundReply) -> tuple[Frame, list[int]]:
    """The last frame of a round, and the tokens of all."""
    tokens: list[int] = []
    async for frame in reply.frames():
        tokens += frame.tokens
    return frame, tokens


async def answer(
    engine: Scheduler,
    target: Target,
    board: Drafting,
    prompt: list[int],
    *,
    count: int,
    right: list[int],
    prefilled: asyncio.Barrier,
    seed: int,
) -> TimedAnswer:
    """One answer of `count` tokens, in rounds of drafts or in one stream.

    Args:
        right: the tokens of the answer, if the board drafts.
        prefilled: what to wait for after the first token.
    """
    random = Random(seed)
    reply = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, len(prompt), n=1))
    session = Session(list(prompt), Sampling(TEMPERATURE, seed=seed, ignore_eos=True), target, reply)
    engine.submit(session, reply)
    _, tokens = await last_frame(reply)
    await prefilled.wait()
    if board.draft:
        # Boards do not draft in step.
        await asyncio.sleep(random.random() * board.pause)
    started = time.perf_counter()
    number = 0
    while len(tokens) < count:
        number += 1
        if board.draft:
            await asyncio.sleep(board.pause)
        guesses = [
            token if random.random() < board.accuracy else token ^ 1
            for token in right[len(tokens) : len(tokens) + board.draft]
        ]
        n = 1 if board.draft else count - len(tokens)
        length = len(prompt) + len(tokens)
        request = RoundRequest(PROTOCOL_VERSION, number, length, draft=guesses, n=n, stream=not board.draft)
        reply = session.begin_round(request)
        engine.submit(session, reply)
        frame, new = await last_frame(reply)
        tokens += reply.request.draft[: frame.accepted] + new
    seconds = time.perf_counter() - started
    engine.release(session)
    return TimedAnswer(tokens[:count], seconds / (len(tokens) - 1))


async def measure(options: argparse.Namespace, target: Target) -> Table:
    engine = Scheduler(lambda: target, lambda _: None, lambda: 0, cache_tokens=0, reuse_prefixes=False)
    await start_engine(engine)
    draft_ms = options.round_trip_ms + options.draft * options.step_ms
    table = Table(
        title=f"boards of one GPU, {options.shape}, prompts of {options.prompt} tokens; drafts of {options.draft}, "
        f"{options.accuracy:.0%} of tokens right, {draft_ms:.0f} ms between rounds; ms per token at 95 % of boards"
    )
    for column in ("boards", "streaming, ms", "tokens/s", "drafting, ms", "tokens/s", "tokens a round"):
        table.add_column(column, justify="right")
    for boards in options.boards:
        random = Random(boards)
        prompts = [[random.randrange(target.vocabulary_size) for _ in range(options.prompt)] for _ in range(boards)]
        right: list[list[int]] = [[] for _ in prompts]
        cells: list[str] = []
        for board in (Drafting(0, 1.0, 0.0), Drafting(options.draft, options.accuracy, draft_ms / 1e3)):
            prefilled = asyncio.Barrier(boards)
            texts = (
                answer(engine, target, board, prompt, count=options.tokens, right=known, prefilled=prefilled, seed=seed)
                for seed, (prompt, known) in enumerate(zip(prompts, right, strict=True))
            )
            answers = await asyncio.gather(*texts)
            right = [each.tokens for each in answers]
            seconds = [each.seconds_per_token for each in answers]
            cells += [f"{1e3 * percentile(seconds, 0.95):.1f}", f"{sum(1 / each for each in seconds):.0f}"]
        alone = (1 - options.accuracy ** (options.draft + 1)) / (1 - options.accuracy) if options.accuracy < 1 else 0.0
        table.add_row(str(boards), *cells, f"{alone:.2f}")
    await asyncio.to_thread(engine.stop)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--boards", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--draft", type=int, default=5, help="tokens of a draft (default: %(default)s)")
    parser.add_argument("--accuracy", type=float, default=0.8, help="of draft tokens (default: %(default)s)")
    text = "of a link, slept between rounds (default: %(default)s)"
    parser.add_argument("--round-trip-ms", type=float, default=60.0, help=text)
    text = "of a draft token, slept between rounds (default: %(default)s)"
    parser.add_argument("--step-ms", type=float, default=15.0, help=text)
    parser.add_argument("--json", type=Path, help="add the table, as one JSON line, to this file")
    options = parser.parse_args()
    target = RandomTarget(options.shape, compiled=True)
    report(asyncio.run(measure(options, target)), options)


if __name__ == "__main__":
    main()
