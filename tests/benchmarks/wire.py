"""Network traffic per answer: `python -m tests.benchmarks run wire`.

Bytes are the kernel's count of TCP payload in both directions, HTTP framing included, for 100-token answers of target
v1 with the shipped draft. The number of rounds depends on the text; every repetition continues other prompts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.benchmarks.harness.benchmark import Benchmark, Measure, Quantity, Scenario, Values
from tests.benchmarks.speed import FAMILY, run_verifier

PROMPTS = ["import argparse\n", "class Stack:\n", "def main():\n", "async def fetch(url", "for line in file:\n"]
TOKENS = 100
PLANS = {
    "K=5, 2 siblings": FIXED_PLAN,
    "K=4": Plan(4),
    "K=0, n=32 streamed": Plan(0, continuation=32),
}
ROUNDS = Quantity("rounds", digits=0)
BYTES = {
    "2": Quantity("bytes of an answer", digits=0, goal=5000),
    "1.1": Quantity("bytes of an answer", digits=0, goal=10000),
}


@asynccontextmanager
async def running() -> AsyncIterator[Measure]:
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    with run_verifier(FAMILY / "target-v1", "--threads", "1") as url:

        async def measure(scenario: Scenario, repetition: int) -> Values:
            http, plan, temperature = scenario.labels.values()
            # A new client for each answer, so that opening the connection is counted.
            async with VerifierClient(url, http2=http == "2") as client:
                generation = Generation(
                    draft,
                    client,
                    draft.tokenizer.encode(PROMPTS[repetition % len(PROMPTS)]).ids,
                    Sampling(float(temperature), seed=repetition, ignore_eos=True),
                    max_new_tokens=TOKENS,
                    planner=FixedPlanner(PLANS[plan]),
                )
                async for _ in generation:
                    pass
            statistics = generation.statistics
            return {ROUNDS.name: statistics.rounds, BYTES[http].name: statistics.bytes_total}

        yield measure


BENCHMARK = Benchmark(
    name="wire",
    title=f"TCP payload of {TOKENS}-token answers",
    scenarios=tuple(
        Scenario({"HTTP": http, "plan": plan, "T": temperature}, (ROUNDS, BYTES[http]))
        for http in BYTES
        for plan in PLANS
        for temperature in ("0", "1")
    ),
    running=running,
    repetitions=10,
    quick_repetitions=3,
)
