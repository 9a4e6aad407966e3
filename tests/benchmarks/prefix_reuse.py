"""Time to the first token of the turns of a chat: `python -m tests.benchmarks.prefix_reuse`. Three minutes.

A chat model of 135M parameters (`draft-export example`) in a verifier process of one thread, and the board's decoding
loop with the model's draft, on one machine. The first message of each chat has about 1,000 tokens, so the second turn
has a history of more than that. Compared are the first turn, the second one with what both ends have kept, and the
second one of a board and a verifier that keep nothing. The three take turns, so that noise of the machine affects all.

    board      from the start of the answer to its first token, the prefill of the draft included; by the board's clock
    draft      the part of it in which the board's draft prefilled and drafted
    verifier   queue, prefill and first forward of the first round; by the verifier's clock
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from edge_runtime.decoding import Generation
from edge_runtime.draft import OnnxDraft
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol.bundle import read_bundle, read_chat_format
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.chat_template import ChatTemplate
from edge_runtime.verifier import VerifierClient
from export.example_family.prepare import prepare_family
from tests.benchmarks.speed import OutcomeRecorder, run_verifier

HISTORY_TOKENS = 1000
ANSWER_TOKENS = 48
PLANS = {"K=4": Plan(4), "streaming": Plan(0, continuation=ANSWER_TOKENS)}
# The goal: the second turn starts this many times sooner than the first.
GOAL = 10.0
TEXTS = sorted(Path(__file__).resolve().parents[2].glob("*/README.md"))


class FirstToken(NamedTuple):
    """Seconds until the first token; see the module docstring.

    Attributes:
        cached: tokens of the prompt that the verifier had cached.
    """

    board: float
    draft: float
    verifier: float
    prompt: int
    cached: int


class Board:
    """A board with its verifier."""

    def __init__(self, bundle: Path, client: VerifierClient, *, prefix_cache_bytes: int) -> None:
        self.draft = OnnxDraft.load(bundle, threads=1, prefix_cache_bytes=prefix_cache_bytes)
        self._client = client

    async def answer(self, prompt: list[int], plan: Plan, tokens: int) -> tuple[FirstToken, list[int]]:
        """Generate an answer. Returns its times and its ids."""
        planner = OutcomeRecorder(plan)
        generation = Generation(
            self.draft, self._client, prompt, Sampling(0.7, seed=1), max_new_tokens=tokens, planner=planner
        )
        async for _ in generation:
            pass
        first, counters = planner.outcomes[0], generation.statistics
        times = FirstToken(
            counters.first_token_seconds,
            first.draft_seconds,
            first.queue_seconds + first.prefill_seconds + first.forward_seconds / (1 + first.further_forwards),
            len(prompt),
            counters.cached_prompt_tokens,
        )
        # Both ends put away the caches of the text in the background.
        await asyncio.sleep(0.2)
        return times, generation.ids[len(prompt) :]


async def run_chats(
    keeping: Board, forgetful: Board, template: ChatTemplate, chats: int
) -> dict[str, list[FirstToken]]:
    """Run the first two turns of some chats; returns the times by plan and kind of turn."""
    tokenizer = keeping.draft.tokenizer
    ids: list[int] = tokenizer.encode("\n".join(path.read_text() for path in TEXTS)).ids
    measured: dict[str, list[FirstToken]] = {}
    for index in range(chats):
        start = (index * 2 * HISTORY_TOKENS) % (len(ids) - HISTORY_TOKENS)
        for number, (name, plan) in enumerate(PLANS.items()):
            # Another text for each plan.
            text = tokenizer.decode(ids[start + number * 20 :][:HISTORY_TOKENS])
            messages = [{"role": "user", "content": f"{name} {index}: {text}\nWhat is this about?"}]
            first, answer = await keeping.answer(tokenizer.encode(template.render(messages)).ids, plan, ANSWER_TOKENS)
            messages += [
                {"role": "assistant", "content": tokenizer.decode(answer)},
                {"role": "user", "content": "And in one word?"},
            ]
            prompt = tokenizer.encode(template.render(messages)).ids
            second, reused = await keeping.answer(prompt, plan, 8)
            control, computed = await forgetful.answer(prompt, plan, 8)
            assert reused == computed, "the text must not depend on what is reused"
            for kind, times in (("first", first), ("second", second), ("second, nothing kept", control)):
                measured.setdefault(f"{name}: {kind}", []).append(times)
    return measured


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--threads", default="1", help="threads of the verifier")
    options = parser.parse_args()
    family = prepare_family()
    target, bundle = family / "target-v1", (family / "bundle").resolve()
    template = ChatTemplate(read_chat_format(read_bundle(bundle, verify=False)), bundle)
    arguments = ("--threads", options.threads)
    with run_verifier(target, *arguments) as url, run_verifier(target, *arguments, "--no-prefix-cache") as other:
        async with VerifierClient(url) as client, VerifierClient(other) as other_client:
            keeping = Board(bundle, client, prefix_cache_bytes=256 << 20)
            forgetful = Board(bundle, other_client, prefix_cache_bytes=0)
            # The first forwards allocate memory.
            for board in (keeping, forgetful):
                await board.answer([5] * HISTORY_TOKENS, PLANS["K=4"], 8)
            measured = await run_chats(keeping, forgetful, template, options.chats)
    table = Table("turn", "prompt", "cached", "board", "draft", "verifier", "sooner: board", "verifier", "goal")
    table.title = f"milliseconds to the first token, median of {options.chats} chats, {os.cpu_count()} cores"
    base: FirstToken | None = None
    for turn, times in measured.items():
        median = FirstToken(*(statistics.median(values) for values in zip(*times, strict=True)))
        base = median if turn.endswith("first") or base is None else base
        is_second = turn.endswith("second")
        table.add_row(
            turn,
            f"{median.prompt:.0f}",
            f"{median.cached:.0f}",
            *(f"{1e3 * seconds:.1f}" for seconds in (median.board, median.draft, median.verifier)),
            f"{base.board / median.board:.1f}",
            f"{base.verifier / median.verifier:.1f}",
            f"at least {GOAL:.0f}" if is_second else "",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    asyncio.run(main())
