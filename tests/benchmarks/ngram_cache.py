"""Benefit and cost of the n-gram cache: `python -m tests.benchmarks.ngram_cache`.

Replays texts of the shipped family's targets in rounds of K draft tokens, as the decoding loop does. Prompts come from
held-out files: Python for target v1, and C++ for target v2, which was fine-tuned after the draft was trained.

    none    without a cache
    cold    an empty cache for each answer, so that only the answer's own text is in it
    warm    a cache that holds `--before` earlier answers to prompts from the same files
    other   a cache that holds answers of target v1 only, none of the version that is replayed

Tokens inside loops are reported separately (`evaluate.loops`): loops raise the acceptance of every draft, and that of a
cache even more. Confidence intervals are bootstrapped over texts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator

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
from tests.toy_family import FAMILY

# Tokens of a prompt, and draft tokens per round.
PROMPT_TOKENS, DRAFT_TOKENS = 96, 5
VERSIONS = {"target-v1": DOMAINS[0], "target-v2": DOMAINS[1]}
TEMPERATURES = (0.0, 0.7, 1.0)


class Tally:
    """Counts of one text: (accepted, drafted) outside loops and in all, and (tokens, rounds)."""

    def __init__(self) -> None:
        self.clear, self.all, self.rounds = [0, 0], [0, 0], [0, 0]


def sample_prompts(draft: OnnxDraft, target: str, count: int, files: int) -> list[list[int]]:
    """Cut `count` prompts at random positions from `files` held-out files in turn."""
    rng = random.Random(7)
    documents = [d.text for d in gather_corpus(VERSIONS[target]).documents if d.held_out and len(d.text) > 3000]
    texts = [draft.tokenizer.encode(text[:50_000]).ids for text in rng.sample(documents, len(documents))]
    texts = [ids for ids in texts if len(ids) > 4 * PROMPT_TOKENS][:files]
    starts = [rng.randrange(len(texts[i % len(texts)]) - PROMPT_TOKENS) for i in range(count)]
    return [texts[i % len(texts)][start : start + PROMPT_TOKENS] for i, start in enumerate(starts)]


def replay(draft: OnnxDraft, text: list[int], sampling: Sampling, cache: NgramCache | None, version: str) -> Tally:
    """Replay the rounds that generate `text` after its prompt, and count acceptances."""
    context, tally, position = draft.new_context(cache), Tally(), PROMPT_TOKENS
    in_loop = find_loops(text)
    if context.ngram_lookup:
        context.ngram_lookup.append(text[:PROMPT_TOKENS])
    while position < len(text):
        tokens = context.propose(text[:position], min(DRAFT_TOKENS, len(text) - position), sampling).tokens
        accepted = accepted_length(tokens, text[position:])
        for index in range(min(accepted + 1, len(tokens))):
            for counts in [tally.all] if in_loop[position + index] else [tally.all, tally.clear]:
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


def measure_rows(options: argparse.Namespace, draft: OnnxDraft) -> Iterator[list[str]]:
    size, bootstrap = draft.manifest.architecture.vocabulary_size, Bootstrap(2000, 1)
    others: dict[float, NgramCache] = {}
    for target in VERSIONS:
        model = load_model(FAMILY / target, "cpu", "float32")[0]
        prompts = sample_prompts(draft, target, options.before + options.answers, options.files)
        for temperature in TEMPERATURES:
            samplings = [Sampling(temperature, seed=index, ignore_eos=True) for index in range(len(prompts))]
            new = TargetWriter(model).generate(prompts, samplings, options.tokens)
            texts = [prompt + ids for prompt, ids in zip(prompts, new, strict=True)]
            jobs = list(zip(texts, samplings, strict=True))
            measured_jobs = jobs[options.before :]
            warm = NgramCache(size)
            for text, sampling in jobs[: options.before]:
                replay(draft, text, sampling, warm, target)
            states = {"none": lambda: None, "cold": lambda: NgramCache(size), "warm": lambda warm=warm: warm}
            if temperature in others:
                states["other"] = lambda cache=others[temperature]: cache
            others[temperature] = warm
            none: list[Tally] = []
            for state, make_cache in states.items():
                tallies = [replay(draft, text, sampling, make_cache(), target) for text, sampling in measured_jobs]
                none = none or tallies
                intervals = [
                    bootstrap.ratio_of_ratios([t.clear for t in tallies], [t.clear for t in none]),
                    *(bootstrap.ratio([getattr(t, name) for t in tallies]) for name in ("clear", "all", "rounds")),
                ]
                gain, clear, everything, tokens = (interval for interval in intervals if interval)
                yield [
                    target,
                    f"{temperature:g}",
                    state,
                    f"{clear.value:.3f}",
                    "" if state == "none" else f"{gain.value:.3f} ({gain.low:.3f} to {gain.high:.3f})",
                    f"{everything.value:.3f}",
                    f"{tokens.value:.2f}",
                ]


def measure_cost(draft: OnnxDraft) -> tuple[float, float]:
    """Return the median seconds per proposal and per recorded token with a full cache, without mixing distributions."""
    rng, size = random.Random(3), draft.manifest.architecture.vocabulary_size
    cache = NgramCache(size)
    # Few distinct ids, so that most n-grams have matches.
    texts = [[rng.randrange(64) for _ in range(256)] for _ in range(256)]
    for text in texts:
        cache.add("v", text)
    propose_seconds, append_seconds = [], []
    for text in texts:
        lookup = NgramLookup(cache, 4096)
        lookup.append(text[:128])
        for end in range(128, 250, 5):
            started = time.perf_counter()
            for position in range(end, end + 5):
                proposal = lookup.propose(text[:position])
                if proposal:
                    proposal.estimate_acceptance(0.3)
            middle = time.perf_counter()
            lookup.append(text[end : end + 5], "v")
            propose_seconds.append((middle - started) / 5)
            append_seconds.append((time.perf_counter() - middle) / 5)
    return statistics.median(propose_seconds), statistics.median(append_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="acceptance with and without the n-gram cache, and its cost")
    parser.add_argument("--before", type=int, default=50, help="earlier answers in a warm cache (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=32, help="answers that are measured (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per answer (default: %(default)s)")
    parser.add_argument(
        "--files", type=int, default=16, help="files that prompts are taken from (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    console = Console(width=120)
    table = Table(
        "target", "T", "cache", "acceptance", "relative to none (95 %)", "with loops", f"tokens/round, K={DRAFT_TOKENS}"
    )
    for row in measure_rows(options, draft):
        table.add_row(*row)
        if not console.is_terminal:
            print(*row, flush=True)
    console.print(table)
    propose, append = measure_cost(draft)
    console.print(f"{1e6 * propose:.0f} us per drafted token, {1e6 * append:.0f} us per verified token, in Python")


if __name__ == "__main__":
    main()
