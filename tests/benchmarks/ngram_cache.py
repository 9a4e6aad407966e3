"""What the n-gram cache brings: `python -m tests.benchmarks run ngram_cache`.

Replays texts of the toy family's targets in rounds of K draft tokens, as the decoding loop does. Prompts come from
held-out files: Python for target v1, and C++ for target v2, which was fine-tuned after the draft was trained. A sample
is one answer.

    none    without a cache
    cold    an empty cache for each answer, so that only the answer's own text is in it
    warm    a cache that holds earlier answers to prompts from the same files

Acceptance is that outside loops (`evaluate.loops`): loops raise the acceptance of every draft, and that of a cache even
more.
"""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import torch

from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.ngram_cache.lookup import NgramCache, NgramLookup
from edge_runtime.protocol.sampling import Sampling, accepted_length
from export.data.corpus import DOMAINS, gather_corpus
from export.evaluate.loops import find_loops
from export.evaluate.proposers import TargetWriter
from tests.benchmarks.harness.benchmark import Benchmark, Measure, Quantity, Scenario, Values
from tests.toy_family import FAMILY

# Tokens of a prompt, and draft tokens per round.
PROMPT_TOKENS, DRAFT_TOKENS = 96, 5
VERSIONS = {"target-v1": DOMAINS[0], "target-v2": DOMAINS[1]}
TEMPERATURES = (0.0, 0.7, 1.0)
STATES = ("none", "cold", "warm")
# Earlier answers in a warm cache, answers that are measured, their tokens, and files that prompts are taken from.
ANSWERS_BEFORE, ANSWERS, ANSWER_TOKENS, FILES = 50, 24, 96, 16

ACCEPTANCE = Quantity("accepted outside loops", "%", digits=1, higher_is_better=True)
TOKENS_PER_ROUND = Quantity("tokens per round", higher_is_better=True)
PROPOSAL = Quantity("a proposal", "us", digits=1)
RECORDING = Quantity("a verified token", "us", digits=1)


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


class Texts:
    """Answers of one target at one temperature, and the caches that hold the earlier ones."""

    def __init__(self, draft: OnnxDraft, model: Any, target: str, temperature: float) -> None:
        self._draft, self._target = draft, target
        prompts = sample_prompts(draft, target, ANSWERS_BEFORE + ANSWERS, FILES)
        self._samplings = [Sampling(temperature, seed=index, ignore_eos=True) for index in range(len(prompts))]
        new = TargetWriter(model).generate(prompts, self._samplings, ANSWER_TOKENS)
        self._texts = [prompt + ids for prompt, ids in zip(prompts, new, strict=True)]
        self._warm = self._empty_cache()
        for index in range(ANSWERS_BEFORE):
            self._replay(index, self._warm)

    def measure(self, state: str, repetition: int) -> Values:
        """Replay an answer with a cache in a state."""
        cache = {"none": None, "cold": self._empty_cache(), "warm": self._warm}[state]
        tally = self._replay(ANSWERS_BEFORE + repetition % ANSWERS, cache)
        values = {TOKENS_PER_ROUND.name: tally.rounds[0] / tally.rounds[1]}
        # A text may be one loop.
        return values | ({ACCEPTANCE.name: 100 * tally.clear[0] / tally.clear[1]} if tally.clear[1] else {})

    def _empty_cache(self) -> NgramCache:
        return NgramCache(self._draft.manifest.architecture.vocabulary_size)

    def _replay(self, index: int, cache: NgramCache | None) -> Tally:
        return replay(self._draft, self._texts[index], self._samplings[index], cache, self._target)


def measure_cost(draft: OnnxDraft) -> Values:
    """Measure a full cache: microseconds for a proposal, and for recording a token, without mixing distributions."""
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
    return {
        PROPOSAL.name: 1e6 * statistics.median(propose_seconds),
        RECORDING.name: 1e6 * statistics.median(append_seconds),
    }


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Measure]:
    torch.set_num_threads(1)
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)

    @functools.cache
    def load(target: str) -> Any:
        return load_model(FAMILY / target, "cpu", "float32")[0]

    @functools.cache
    def texts(target: str, temperature: str) -> Texts:
        return Texts(draft, load(target), target, float(temperature))

    async def measure(scenario: Scenario, repetition: int) -> Values:
        if PROPOSAL in scenario.quantities:
            return measure_cost(draft)
        target, temperature, state = scenario.labels.values()
        return texts(target, temperature).measure(state, repetition)

    yield measure


BENCHMARK = Benchmark(
    name="ngram_cache",
    title=f"Drafts with and without an n-gram cache, K={DRAFT_TOKENS}",
    scenarios=(
        *(
            Scenario({"target": target, "T": f"{temperature:g}", "cache": state}, (ACCEPTANCE, TOKENS_PER_ROUND))
            for target in VERSIONS
            for temperature in TEMPERATURES
            for state in STATES
        ),
        Scenario({"of": "a full cache"}, (PROPOSAL, RECORDING), "Python time"),
    ),
    running=running,
    repetitions=ANSWERS,
    quick_repetitions=6,
)
