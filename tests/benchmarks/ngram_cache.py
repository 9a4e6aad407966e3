"""What the memory of verified text gives, and costs: `python -m tests.benchmarks.memory`.

The board's draft guesses what the shipped family's targets write, K tokens a round, as the loop does, behind prompts of
files that no member was trained on: Python for target v1, C++ for target v2, fine-tuned since the draft was made.

    none    without a memory
    cold    each answer with a memory of its own: only what the answer itself says helps
    warm    the same answers with what came before: `--before` answers to prompts from the same files
    other   the same with answers of target v1 in the memory, and none of its own version's

Loops are counted apart (`evaluate.loops`): they flatter every draft, and a memory more. Intervals are over texts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cloud_verifier.acceptance.bootstrap import Bootstrap
from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.ngram_cache.lookup import NgramCache, NgramLookup
from edge_runtime.protocol.sampling import Sampling, accepted_length
from export.data.corpus import DOMAINS, gather_corpus
from export.evaluate.loops import find_loops
from export.evaluate.proposers import TargetWriter

FAMILY = Path(__file__).resolve().parent.parent.parent / "export" / "example_family"
PROMPT, DRAFT = 96, 5
VERSIONS = {"target-v1": DOMAINS[0], "target-v2": DOMAINS[1]}
TEMPERATURES = (0.0, 0.7, 1.0)


class Tally:
    """Guesses that were right, and all, of one text: outside loops, all of them; and its rounds."""

    def __init__(self) -> None:
        self.clear, self.all, self.rounds = [0, 0], [0, 0], [0, 0]


def prompts(draft: OnnxDraft, target: str, count: int, files: int) -> list[list[int]]:
    """Pieces of `files` held-out files, in turn."""
    chance = random.Random(7)
    documents = [d.text for d in gather_corpus(VERSIONS[target]).documents if d.held_out and len(d.text) > 3000]
    texts = [draft.tokenizer.encode(text[:50_000]).ids for text in chance.sample(documents, len(documents))]
    texts = [ids for ids in texts if len(ids) > 4 * PROMPT][:files]
    starts = [chance.randrange(len(texts[i % len(texts)]) - PROMPT) for i in range(count)]
    return [texts[i % len(texts)][start : start + PROMPT] for i, start in enumerate(starts)]


def answer(draft: OnnxDraft, text: list[int], sampling: Sampling, memory: NgramCache | None, version: str) -> Tally:
    """Plays the rounds that lead from the prompt to `text`."""
    context, tally, position = draft.new_context(memory), Tally(), PROMPT
    inside = find_loops(text)
    if context.ngram_lookup:
        context.ngram_lookup.append(text[:PROMPT])
    while position < len(text):
        tokens = context.propose(text[:position], min(DRAFT, len(text) - position), sampling).tokens
        accepted = accepted_length(tokens, text[position:])
        for index in range(min(accepted + 1, len(tokens))):
            for counts in [tally.all] if inside[position + index] else [tally.all, tally.clear]:
                counts[0] += index < accepted
                counts[1] += 1
        step = text[position : position + accepted + 1]
        tally.rounds[0] += len(step)
        tally.rounds[1] += 1
        position += len(step)
        if context.ngram_lookup:
            context.ngram_lookup.append(step, version)
    if context.ngram_lookup:
        context.ngram_lookup.finish()
    return tally


def rows(options: argparse.Namespace, draft: OnnxDraft) -> Iterator[list[str]]:
    size, bootstrap = draft.manifest.architecture.vocabulary_size, Bootstrap(2000, 1)
    others: dict[float, NgramCache] = {}
    for target in VERSIONS:
        model = load_model(FAMILY / target, "cpu", "float32")[0]
        given = prompts(draft, target, options.before + options.answers, options.files)
        for temperature in TEMPERATURES:
            samplings = [Sampling(temperature, seed=index, ignore_eos=True) for index in range(len(given))]
            new = TargetWriter(model).generate(given, samplings, options.tokens)
            texts = [prompt + ids for prompt, ids in zip(given, new, strict=True)]
            jobs = list(zip(texts, samplings, strict=True))
            judged = jobs[options.before :]
            warm = NgramCache(size)
            for text, sampling in jobs[: options.before]:
                answer(draft, text, sampling, warm, target)
            states = {"none": lambda: None, "cold": lambda: NgramCache(size), "warm": lambda warm=warm: warm}
            if temperature in others:
                states["other"] = lambda memory=others[temperature]: memory
            others[temperature] = warm
            none: list[Tally] = []
            for state, memory in states.items():
                tallies = [answer(draft, text, sampling, memory(), target) for text, sampling in judged]
                none = none or tallies
                ratios = [
                    bootstrap.ratio_of_ratios([t.clear for t in tallies], [t.clear for t in none]),
                    *(bootstrap.ratio([getattr(t, name) for t in tallies]) for name in ("clear", "all", "rounds")),
                ]
                assert all(ratios)
                gain, clear, everything, tokens = ratios
                yield [
                    target,
                    f"{temperature:g}",
                    state,
                    f"{clear.value:.3f}",
                    "" if state == "none" else f"{gain.value:.3f} ({gain.low:.3f} to {gain.high:.3f})",
                    f"{everything.value:.3f}",
                    f"{tokens.value:.2f}",
                ]


def cost(draft: OnnxDraft) -> tuple[float, float]:
    """Seconds of a hint, mixing apart, and of learning a token; with a full memory, medians."""
    chance, size = random.Random(3), draft.manifest.architecture.vocabulary_size
    memory = NgramCache(size)
    # Few different ids, so that there is much to find.
    texts = [[chance.randrange(64) for _ in range(256)] for _ in range(256)]
    for text in texts:
        memory.add("v", text)
    hints, learnt = [], []
    for text in texts:
        recall = NgramLookup(memory, 4096)
        recall.append(text[:128])
        for end in range(128, 250, 5):
            started = time.perf_counter()
            for position in range(end, end + 5):
                hint = recall.propose(text[:position])
                if hint:
                    hint.estimate_acceptance(0.3)
            middle = time.perf_counter()
            recall.append(text[end : end + 5], "v")
            hints.append((middle - started) / 5)
            learnt.append((time.perf_counter() - middle) / 5)
    return statistics.median(hints), statistics.median(learnt)


def main() -> None:
    parser = argparse.ArgumentParser(description="acceptance with and without the memory, and what it costs")
    parser.add_argument("--before", type=int, default=50, help="answers heard before (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=32, help="that are judged (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer (default: %(default)s)")
    parser.add_argument("--files", type=int, default=16, help="that prompts are from (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    console = Console(width=120)
    table = Table("target", "T", "memory", "accepted", "times none's (95 %)", "with loops", f"tokens/round, K={DRAFT}")
    for row in rows(options, draft):
        table.add_row(*row)
        if not console.is_terminal:
            print(*row, flush=True)
    console.print(table)
    hint, learn = cost(draft)
    console.print(f"{1e6 * hint:.0f} us per drafted token, {1e6 * learn:.0f} us per verified one, in Python")


if __name__ == "__main__":
    main()
