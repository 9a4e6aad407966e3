"""Whether a verifier that runs keeps the rule: `python -m tests.benchmarks.plans http://127.0.0.1:8500`.

Every prompt is continued under four plans at once (streamed, with siblings, with rounds ahead, with several own
tokens), by the example family's draft, and the texts must be one. It is how GPUs, adapters that have just come, and
teams of GPUs are tried, which the tests of a machine without them cannot do; the hashes can be compared with those of
another verifier of the same version, on a CPU for instance.
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
    Plan(0, own=4096),
    Plan(2, siblings=2, sibling_confidence=1.0, ahead=3, in_flight=2),
    Plan(8, own=4),
)
PROMPTS = ("def read_config(path):", "import os, sys", "class Queue:\n    def __init__(self")
TEMPERATURES = (0.0, 0.7, 1.0)


async def compare(url: str, models: list[str], tokens: int) -> int:
    """Prints a line for each model and temperature. Returns how many prompts had more than one text."""
    draft = OnnxDraft.load(BUNDLE)
    differing = rounds = 0
    async with VerifierClient(url) as client:

        async def text(model: str, prompt: str, temperature: float, plan: Plan) -> str:
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
                every = [(prompt, plan) for prompt in PROMPTS for plan in PLANS]
                hashes = await asyncio.gather(*(text(model, prompt, temperature, plan) for prompt, plan in every))
                texts = [set(hashes[index : index + len(PLANS)]) for index in range(0, len(every), len(PLANS))]
                several = sum(len(found) > 1 for found in texts)
                differing += several
                shown = " ".join("/".join(sorted(found)) for found in texts)
                print(f"{model or 'default'} T={temperature:g}: {several} of {len(texts)} differ  {shown}", flush=True)
    print(f"{rounds} rounds, {differing} prompts with more than one text")
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a verifier of the example family")
    parser.add_argument("--model", nargs="+", default=[""], help="versions or aliases (default: the verifier's)")
    parser.add_argument("--tokens", type=int, default=96, help="of each text (default: %(default)s)")
    options = parser.parse_args()
    raise SystemExit(bool(asyncio.run(compare(options.url, options.model, options.tokens))))


if __name__ == "__main__":
    main()
