"""Check that a running verifier gives the same text under all plans: `python -m tests.benchmarks.plans URL`.

Continues every prompt under four plans at once (streamed, with siblings, with rounds in flight, with several
bonus tokens) with the example family's draft or another one; all texts must be equal. Use it to check GPUs, newly
loaded adapters and tensor parallelism, which tests on a machine without GPUs cannot cover. The hashes can be compared
with those of another verifier of the same version, for instance on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from pathlib import Path

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient

BUNDLE = Path(__file__).parent.parent.parent / "export" / "example_family" / "bundle"
PLANS = (
    Plan(5, siblings=3, sibling_confidence=1.0),
    Plan(0, continuation=4096),
    Plan(2, siblings=2, sibling_confidence=1.0, draft_ahead=3, in_flight=2),
    Plan(8, continuation=4),
)
PROMPTS = ("def read_config(path):", "import os, sys", "class Queue:\n    def __init__(self")
TEMPERATURES = (0.0, 0.7, 1.0)


async def compare(url: str, models: list[str], tokens: int, bundle: Path = BUNDLE) -> int:
    """Print a line for each model and temperature. Return the number of prompts with more than one text."""
    draft = OnnxDraft.load(bundle)
    differing = rounds = 0
    async with VerifierClient(url) as client:

        async def hash_text(model: str, prompt: str, temperature: float, plan: Plan) -> str:
            nonlocal rounds
            sampling = Sampling(temperature, seed=5, ignore_eos=True)
            ids = draft.tokenizer.encode(prompt).ids
            generation = Generation(
                draft, client, ids, sampling, max_new_tokens=tokens, planner=FixedPlanner(plan), model=model
            )
            async for _ in generation:
                pass
            rounds += generation.statistics.rounds
            return hashlib.sha256(str(generation.ids).encode()).hexdigest()[:8]

        for model in models:
            for temperature in TEMPERATURES:
                jobs = [(prompt, plan) for prompt in PROMPTS for plan in PLANS]
                hashes = await asyncio.gather(*(hash_text(model, prompt, temperature, plan) for prompt, plan in jobs))
                texts = [set(hashes[index : index + len(PLANS)]) for index in range(0, len(jobs), len(PLANS))]
                differing_here = sum(len(hashes_of_prompt) > 1 for hashes_of_prompt in texts)
                differing += differing_here
                shown = " ".join("/".join(sorted(hashes_of_prompt)) for hashes_of_prompt in texts)
                print(
                    f"{model or 'default'} T={temperature:g}: {differing_here} of {len(texts)} differ  {shown}",
                    flush=True,
                )
    print(f"{rounds} rounds, {differing} prompts with more than one text")
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="URL of a verifier of the example family")
    parser.add_argument("--model", nargs="+", default=[""], help="versions or aliases (default: the verifier's)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per text (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="draft that fits the verifier's target")
    options = parser.parse_args()
    raise SystemExit(bool(asyncio.run(compare(options.url, options.model, options.tokens, options.bundle))))


if __name__ == "__main__":
    main()
