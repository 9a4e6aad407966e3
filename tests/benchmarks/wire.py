"""Network traffic per answer: `python -m tests.benchmarks.wire`.

Bytes are the kernel's count of TCP payload in both directions, HTTP framing included, for 100-token answers of target
v1 with the shipped draft. The number of rounds depends on the text, so the results are averaged over several prompts.
"""

from __future__ import annotations

import asyncio

import rich
from rich.table import Table

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.benchmarks.speed import FAMILY, run_verifier

PROMPTS = ["import argparse\n", "class Stack:\n", "def main():\n", "async def fetch(url", "for line in file:\n"]
TOKENS = 100


async def measure(url: str, http2: bool, plan: Plan, temperature: float) -> tuple[float, float, float]:
    """Return (mean rounds, mean bytes, maximum bytes) per answer."""
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    rounds, totals = [], []
    for seed, prompt in enumerate(PROMPTS):
        # A new client for each answer, so that opening the connection is counted.
        async with VerifierClient(url, http2=http2) as client:
            generation = Generation(
                draft,
                client,
                draft.tokenizer.encode(prompt).ids,
                Sampling(temperature, seed=seed, ignore_eos=True),
                max_new_tokens=TOKENS,
                planner=FixedPlanner(plan),
            )
            async for _ in generation:
                pass
        rounds.append(generation.statistics.rounds)
        totals.append(generation.statistics.bytes_total)
    return sum(rounds) / len(rounds), sum(totals) / len(totals), max(totals)


def main() -> None:
    table = Table("HTTP", "plan", "T", "rounds", "bytes per 100-token answer", "worst", "goal")
    with run_verifier(FAMILY / "target-v1", "--threads", "1") as url:
        for http2 in (True, False):
            for name, plan in (
                ("K=5, 2 siblings", FIXED_PLAN),
                ("K=4", Plan(4)),
                ("K=0, n=32 streamed", Plan(0, continuation=32)),
            ):
                for temperature in (0.0, 1.0):
                    rounds, mean, worst = asyncio.run(measure(url, http2, plan, temperature))
                    table.add_row(
                        "2" if http2 else "1.1",
                        name,
                        f"{temperature:g}",
                        f"{rounds:.0f}",
                        f"{mean:.0f}",
                        f"{worst:.0f}",
                        "5000" if http2 else "10000",
                    )
    rich.print(table)


if __name__ == "__main__":
    main()
