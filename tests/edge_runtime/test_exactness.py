"""Exactness, the central property: the text is a function of target, prompt, sampling parameters and seed alone.

transformers' `generate` continues every prompt with the target alone; a real verifier continues it under every draft,
plan and fault below, and the ids must be equal. To finish within minutes, texts are short, every plan and fault meets
every prompt under one of the samplings, in turn, so that every pair of them occurs, and the plans are a few that cover
each value of K, siblings and n. FLEXSPEC_EXACT=full runs all plans of drafts x K x siblings x n, and all faults, under
all samplings, with more prompts and longer texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.model.reference import make_logits_processors
from cloud_verifier.model.target import Target, load_model
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import Conditions, FixedPlanner, Outcome, Plan, Planner
from edge_runtime.protocol.messages import LOGPROB_UNITS, TokenLogprobs
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.session import VerifierSession
from tests.conftest import ComputeOnce, serving

FULL = os.environ.get("FLEXSPEC_EXACT") == "full"
# A multiple of the number of samplings, so that every plan and every fault meets each sampling equally often.
PROMPTS = 40 if FULL else 10
CHUNK = 5
PROMPT_TOKENS = 40
# The token that ends a text.
END = 0
# Enough for several rounds under every plan, and for the faults, which occur in the first rounds.
NEW_TOKENS = 128 if FULL else 48
# Texts generated at the same time.
BATCH = 40

SAMPLINGS = {
    "greedy": Sampling(seed=11),
    "T=0.7": Sampling(temperature=0.7, seed=12),
    "T=1, top-p": Sampling(temperature=1.0, top_p=0.95, seed=13),
    "penalties": Sampling(
        temperature=0.8,
        seed=14,
        min_p=0.02,
        repetition_penalty=1.15,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={13: 1.5, 200: -1.0},
    ),
    # Most texts end at " the", but not before their 25th token.
    "bounded": Sampling(seed=15, frequency_penalty=0.4, min_tokens=24, stop_ids=[311]),
}

ALL_PLANS = [
    (draft, Plan(k, continuation=n, siblings=b))
    for draft, k, b, n in itertools.product(["shipped", "other"], [0, 1, 4, 8, 16], [0, 3], [1, 4, 32])
]
AHEAD = Plan(2, siblings=2, draft_ahead=3, in_flight=2)
ALL_PLANS += [("shipped", AHEAD), ("other", AHEAD), ("shipped", Plan(0, continuation=4, draft_ahead=1))]
ALL_PLANS += [("shipped", Plan(0, continuation=32, siblings=2, shadow=True))]
COVERING_PLANS = [
    ("shipped", Plan(0, continuation=32, siblings=2, shadow=True)),
    ("shipped", Plan(1, continuation=4, siblings=3)),
    ("shipped", Plan(4, continuation=1)),
    ("other", Plan(4, continuation=4, siblings=3)),
    ("shipped", Plan(8, continuation=1, siblings=3)),
    ("other", Plan(8, continuation=32)),
    ("shipped", Plan(16, continuation=1)),
    ("shipped", AHEAD),
]
PLANS = ALL_PLANS if FULL else COVERING_PLANS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(family: Path) -> list[list[int]]:
    """The first tokens of modules of the standard library."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(family / "target-v1" / "tokenizer.json"))
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text() for path in sorted(library.glob("[a-z]*.py"))]
    ids = [tokenizer.encode(text[:600])[:PROMPT_TOKENS] for text in texts if len(text) > 600]
    assert len(ids) >= PROMPTS
    return ids[:: len(ids) // PROMPTS][:PROMPTS]


@pytest.fixture(scope="module")
def reference(family: Path, compute_once: ComputeOnce) -> ReferenceTexts:
    return ReferenceTexts(family / "target-v1", compute_once)


class ReferenceTexts:
    """Continuations by the target alone."""

    def __init__(self, target: Path, compute_once: ComputeOnce) -> None:
        self._target = target
        self._compute_once = compute_once

    def __call__(self, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
        """Return the continuations of `prompts`, all of the same length, by name of the sampling."""
        name = hashlib.sha256(repr(prompts).encode()).hexdigest()
        texts: dict[str, list[list[int]]] = json.loads(self._compute_once(name, lambda: self._generate(prompts)))
        return texts

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self._target, "cpu", "float32")[0]

    def _generate(self, prompts: list[list[int]]) -> bytes:
        ids = torch.tensor(prompts * len(SAMPLINGS))
        samplings = [sampling for sampling in SAMPLINGS.values() for _ in prompts]
        rows = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
            logits_processor=[OwnParameters(self.model.config.vocab_size, samplings)],
        )
        texts = [
            _until_end(row[PROMPT_TOKENS:], end_ids(sampling))
            for row, sampling in zip(rows.tolist(), samplings, strict=True)
        ]
        by_sampling = {name: texts[i * len(prompts) :][: len(prompts)] for i, name in enumerate(SAMPLINGS)}
        return json.dumps(by_sampling).encode()


class OwnParameters(LogitsProcessor):  # type: ignore[misc]
    """Lets `generate` process each row with transformers' processors for its own sampling parameters and noise."""

    def __init__(self, vocabulary: int, samplings: list[Sampling]) -> None:
        self._processors = [
            make_logits_processors(sampling, vocabulary, PROMPT_TOKENS, end_ids(sampling), torch.device("cpu"))
            for sampling in samplings
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = enumerate(self._processors)
        return torch.cat([process(input_ids[[row]], scores[[row]]) for row, process in rows])


def end_ids(sampling: Sampling) -> frozenset[int]:
    return frozenset([END, *sampling.stop_ids])


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    length = next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def connected(url: str, transport: httpx.AsyncBaseTransport | None = None) -> VerifierClient:
    """A client that waits for a busy machine as long as the test may."""
    return VerifierClient(url, deadline=300.0, transport=transport)


def samplings_for(prompt: int, case: int) -> list[str]:
    """Names of the samplings under which a prompt meets a plan or fault."""
    samplings = list(SAMPLINGS)
    return samplings if FULL else [samplings[(prompt + case) % len(samplings)]]


async def generate(
    client: VerifierClient,
    draft: OnnxDraft | None,
    prompt: list[int],
    sampling: str,
    planner: Planner,
    new_tokens: int = NEW_TOKENS,
) -> Generation:
    generation = Generation(draft, client, prompt, SAMPLINGS[sampling], max_new_tokens=new_tokens, planner=planner)
    async for _ in generation:
        pass
    return generation


@pytest.mark.parametrize("first", range(0, PROMPTS, CHUNK))
async def test_every_draft_and_plan_gives_the_reference_text(
    first: int,
    reference: ReferenceTexts,
    target_v1: Target,
    prompts: list[list[int]],
    shipped_draft: OnnxDraft,
    other_draft: OnnxDraft,
) -> None:
    drafts = {"shipped": shipped_draft, "other": other_draft}
    chunk = prompts[first : first + CHUNK]
    expected = reference(chunk)
    cases = [
        (index, draft, plan, sampling)
        for index in range(CHUNK)
        for case, (draft, plan) in enumerate(PLANS)
        for sampling in samplings_for(first + index, case)
    ]
    # The texts of the first prompt are generated one by one, all others in batches.
    alone = len(cases) // CHUNK if first == 0 else 0
    batches = [[case] for case in cases[:alone]]
    batches += [cases[start : start + BATCH] for start in range(alone, len(cases), BATCH)]
    async with serving(target_v1) as server, connected(server.url) as client:
        for batch in batches:
            generations = await asyncio.gather(
                *(
                    generate(client, drafts[draft], chunk[index], sampling, FixedPlanner(plan))
                    for index, draft, plan, sampling in batch
                )
            )
            for case, generation in zip(batch, generations, strict=True):
                text = expected[case[3]][case[0]]
                assert generation.ids[PROMPT_TOKENS:] == text, case
                assert generation.finish == ("stop" if text[-1] in end_ids(SAMPLINGS[case[3]]) else "length")


class AnswerFault:
    """A fault in the middle of one answer; this one is none."""

    def __init__(self, server: RestartingAddress, client: VerifierClient) -> None:
        self.server, self.client, self.pieces = server, client, 0

    async def after_piece(self) -> None:
        """Called after every piece of the answer."""
        self.pieces += 1


class Restart(AnswerFault):
    """The verifier restarts at the same address and loses all sessions."""

    async def after_piece(self) -> None:
        await super().after_piece()
        if self.pieces == 3:
            await self.server.restart()


class Evict(AnswerFault):
    """Another session takes the only slot."""

    async def after_piece(self) -> None:
        await super().after_piece()
        if self.pieces in (2, 5):
            async for _ in VerifierSession(self.client, [5, 6, 7], Sampling()).run_round([]):
                pass


class Twice(httpx.AsyncBaseTransport):
    """Sends every request twice and returns the second reply."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport(http1=False, http2=True)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        first = await self._inner.handle_async_request(request)
        await first.aread()
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class RestartingAddress:
    """One address in front of restarting verifiers: a restart cuts every connection and loses every session.

    The board sees the same as if the process had been killed and started again.
    """

    def __init__(self, target: Target, limits: VerifierLimits | None = None) -> None:
        self._target, self._limits = target, limits
        self._running = contextlib.AsyncExitStack()
        self._restarting = asyncio.Lock()
        self._connections: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> RestartingAddress:
        self._backend = await self._running.enter_async_context(serving(self._target, self._limits))
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._cut()
        self._listener.close()
        await self._running.aclose()

    async def restart(self) -> None:
        async with self._restarting:
            self._cut()
            await self._running.aclose()
            self._backend = await self._running.enter_async_context(serving(self._target, self._limits))

    def _cut(self) -> None:
        for writer in self._connections:
            writer.transport.abort()
        self._connections.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._backend.url.removeprefix("http://").split(":")
        backend_reader, backend_writer = await asyncio.open_connection(host, int(port))
        self._connections |= {writer, backend_writer}
        await asyncio.gather(_copy(reader, backend_writer), _copy(backend_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    writer.close()


FAULTS = {
    "restart": (Restart, Plan(4, continuation=4, siblings=3)),
    "evict": (Evict, Plan(8, continuation=1, siblings=3)),
    "twice": (AnswerFault, Plan(4, continuation=4, siblings=3)),
    "restart, rounds ahead": (Restart, AHEAD),
    "twice, rounds ahead": (AnswerFault, AHEAD),
}


@pytest.mark.parametrize("first", range(0, PROMPTS, CHUNK))
@pytest.mark.parametrize("fault", FAULTS)
async def test_no_fault_changes_the_text(
    fault: str,
    first: int,
    reference: ReferenceTexts,
    target_v1: Target,
    prompts: list[list[int]],
    shipped_draft: OnnxDraft,
) -> None:
    kind, plan = FAULTS[fault]
    evicts = fault == "evict"
    chunk = prompts[first : first + CHUNK]
    expected = reference(chunk)
    cases = [
        (index, sampling)
        for index in range(CHUNK)
        for sampling in samplings_for(first + index, list(FAULTS).index(fault))
    ]

    async def check(index: int, sampling: str) -> int:
        generation = Generation(
            shipped_draft,
            client,
            chunk[index],
            SAMPLINGS[sampling],
            max_new_tokens=NEW_TOKENS,
            planner=FixedPlanner(plan),
        )
        faults = kind(server, client)
        async for _ in generation:
            await faults.after_piece()
        assert generation.ids[PROMPT_TOKENS:] == expected[sampling][index]
        return generation.statistics.recoveries

    async with RestartingAddress(target_v1, VerifierLimits(max_sessions=1) if evicts else None) as server:
        transport = Twice() if fault.startswith("twice") else None
        async with connected(server.url, transport) as client:
            if evicts:
                recoveries = [await check(*case) for case in cases]
            else:
                recoveries = await asyncio.gather(*(check(*case) for case in cases))
    # Some texts may end before the fault occurs, but not all.
    assert any(recoveries) == (not fault.startswith("twice"))


class RandomPlanner:
    """Returns random plans."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def plan(self, conditions: Conditions) -> Plan:
        pick = self._random
        return Plan(
            draft=pick.choice([0, 1, 3, 9, 17, 40]),
            continuation=pick.choice([1, 1, 2, 7, 40, 5000]),
            siblings=pick.randrange(6),
            sibling_confidence=pick.random(),
            min_confidence=pick.random() * 0.5,
            min_survival=pick.random() * 0.5,
            calibration=tuple(pick.random() for _ in range(pick.randrange(4))),
            draft_ahead=pick.choice([0, 0, 1, 5]),
            in_flight=pick.choice([1, 2]),
            shadow=pick.choice([False, True]),
        )

    def observe(self, outcome: Outcome) -> None: ...


async def test_random_plans_with_many_concurrent_texts(
    reference: ReferenceTexts, target_v1: Target, prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    chunk = prompts[:CHUNK]
    jobs = list(itertools.product(range(4), SAMPLINGS))
    async with serving(target_v1, VerifierLimits(max_sessions=6)) as server, connected(server.url) as client:
        texts = await asyncio.gather(
            *(
                generate(client, shipped_draft, chunk[index], sampling, RandomPlanner(seed))
                for seed, (index, sampling) in enumerate(jobs)
            )
        )
    for (index, sampling), generation in zip(jobs, texts, strict=True):
        assert generation.ids[PROMPT_TOKENS:] == reference(chunk)[sampling][index]


@pytest.mark.parametrize("fault", [None, *FAULTS])
async def test_log_probabilities_are_the_targets_under_any_plan_and_fault(
    fault: str | None, reference: ReferenceTexts, target_v1: Target, prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    """One entry for every token, whatever is drafted, streamed, repeated, cut off or lost; compared with PyTorch."""
    kind, plan = FAULTS[fault] if fault else (AnswerFault, Plan(4, continuation=9, siblings=3))
    chunk = prompts[:CHUNK]
    async with RestartingAddress(target_v1, VerifierLimits(max_sessions=1) if fault == "evict" else None) as server:
        transport = Twice() if fault and fault.startswith("twice") else None
        async with connected(server.url, transport) as client:
            for index, name in enumerate(SAMPLINGS):
                generation = Generation(
                    shipped_draft,
                    client,
                    chunk[index],
                    SAMPLINGS[name],
                    # The last round is cut off.
                    max_new_tokens=NEW_TOKENS // 2 + 1,
                    planner=FixedPlanner(plan),
                    logprobs=3,
                )
                entries: list[TokenLogprobs] = []
                faults = kind(server, client)
                async for piece in generation:
                    entries += piece.logprobs
                    assert len(generation.ids) == PROMPT_TOKENS + len(entries)
                    await faults.after_piece()
                new = generation.ids[PROMPT_TOKENS:]
                assert new == reference(chunk)[name][index][: NEW_TOKENS // 2 + 1]
                with torch.inference_mode():
                    logits = reference.model(torch.tensor([generation.ids])).logits[0, PROMPT_TOKENS - 1 : -1]
                expected = logits.double().log_softmax(-1)
                values, ids = expected.topk(2)
                for place, (token, entry) in enumerate(zip(new, entries, strict=True)):
                    rounding = 0.51 / LOGPROB_UNITS + 1e-4
                    assert entry.logprob == pytest.approx(expected[place, token].item(), abs=rounding)
                    assert [token for token, _ in entry.top] == ids[place].tolist()
                    assert [value for _, value in entry.top] == pytest.approx(values[place].tolist(), abs=rounding)


async def test_drafting_ahead_and_early_rounds_occur(
    target_v1: Target, prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    drafted_ahead = early_rounds = 0
    async with serving(target_v1) as server, connected(server.url) as client:
        for prompt in prompts[:4]:
            generation = await generate(client, shipped_draft, prompt, "greedy", FixedPlanner(AHEAD))
            drafted_ahead += generation.statistics.drafted_ahead
            early_rounds += generation.statistics.early_rounds
    assert drafted_ahead > early_rounds > 0


async def test_leaving_early_closes_the_session(
    target_v1: Target, prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    async with serving(target_v1) as server, connected(server.url) as client:
        generation = Generation(shipped_draft, client, prompts[0], Sampling(ignore_eos=True), max_new_tokens=NEW_TOKENS)
        pieces: AsyncIterator[object] = aiter(generation)
        await anext(pieces)
        task = asyncio.create_task(anext(pieces))
        await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.aclose()
        assert generation.statistics.rounds >= 1
        async with connected(server.url) as another:
            again = await generate(another, shipped_draft, prompts[0], "greedy", FixedPlanner(Plan(4)), 8)
            assert again.finish == "length"
