"""Exactness under grammars: drafts, plans, faults and company change no text that a grammar constrains.

The reference is transformers' `generate` with its own processors and llguidance's own functions for logits
(`reference.GrammarLogitsProcessor`). To finish within minutes, every plan and fault meets every prompt under one of the
grammars and one of the samplings, in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import httpx
import jsonschema
import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cloud_verifier.api.app import VerifierLimits, VerifierService
from cloud_verifier.model.onnx_speculation import OnnxSpeculation
from cloud_verifier.model.reference import make_logits_processors
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.registry.checkpoint import load_tokenizer
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Outcome, Plan, Planner
from edge_runtime.protocol import grammar_sources
from edge_runtime.protocol.grammar import GrammarMatcher
from edge_runtime.protocol.grammar_trial import TriedGrammarCompiler
from edge_runtime.protocol.logits_processing import make_processor
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.tool_calls.forms import tool_call_form
from edge_runtime.service.tool_calls.grammar import AddedTokens, AnswerShape, Tool, build_grammar
from edge_runtime.verifier.client import VerifierClient
from tests.cloud_verifier.protocol_client import listening
from tests.conftest import ComputeOnce, serving
from tests.edge_runtime.test_exactness import (
    AHEAD,
    COVERING_PLANS,
    FAULTS,
    RandomPlanner,
    RestartingAddress,
    Twice,
    connected,
)

END, PADDING = 0, 1
NEW_TOKENS = 48
PROMPTS = (
    "class Connection:\n    def __init__(self, host, port",
    "import unittest\n\nclass Test",
    'def read_config(path):\n    """Read',
    "# include the header\nfor name in sorted(os.listdir(path)):\n",
    "    async def fetch(self, url: str) -> bytes:\n",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "port": {"type": "integer", "minimum": 0, "maximum": 65535},
        "modes": {"type": "array", "items": {"enum": ["read", "write", "append"]}, "minItems": 1, "maxItems": 3},
        "binary": {"type": "boolean"},
    },
    "required": ["name", "port", "modes", "binary"],
    "additionalProperties": False,
}
TOOLS = [
    Tool("close", {"properties": {"code": {"enum": [0, 1, 2]}, "reason": {"type": "string", "maxLength": 9}}}),
    Tool("log", {"properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}),
]
GRAMMARS = {
    "schema": grammar_sources.from_json_schema(SCHEMA),
    # Whitespace is free, so hardly anything is forced.
    "loose schema": grammar_sources.from_json_schema(SCHEMA, {"whitespace_pattern": r"[ \n]{0,3}"}),
    "regex": grammar_sources.from_regex(r"(self|cls)(\.[a-z_]{2,9}){1,6}(\(\))?"),
    "GBNF": grammar_sources.from_grammar(
        'root ::= "return " expr\nexpr ::= term (" " [-+*] " " term)*\nterm ::= [a-z]+ | "(" expr ")" | [1-9] [0-9]*\n'
    ),
    "tool call": build_grammar(
        AnswerShape(form=tool_call_form("llama3"), tools=TOOLS, required=True, parallel=False), AddedTokens()
    ),
}
SAMPLINGS = {
    "greedy": Sampling(seed=21),
    # Longer than what some of the grammars allow.
    "T=0.7, min_tokens": Sampling(temperature=0.7, seed=22, min_tokens=40),
    "T=1, top-p, penalties": Sampling(
        temperature=1.0, top_p=0.95, seed=23, repetition_penalty=1.1, frequency_penalty=0.2, logit_bias={200: 1.0}
    ),
}

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    """What a text is generated from."""

    prompt: int
    grammar: str
    sampling: str

    @property
    def parameters(self) -> Sampling:
        return msgspec.structs.replace(SAMPLINGS[self.sampling], grammar=GRAMMARS[self.grammar])


# Every prompt with every grammar, under one of the samplings in turn.
CASES = [
    Case(prompt, grammar, list(SAMPLINGS)[(prompt + number) % len(SAMPLINGS)])
    for prompt in range(len(PROMPTS))
    for number, grammar in enumerate(GRAMMARS)
]


def cases_for(number: int) -> list[Case]:
    """The cases that a plan or fault meets: every prompt, each with another grammar."""
    return [CASES[prompt * len(GRAMMARS) + (prompt + number) % len(GRAMMARS)] for prompt in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def prompts(shipped_draft: OnnxDraft) -> list[list[int]]:
    return [shipped_draft.tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def reference(family: Path, prompts: list[list[int]], compute_once: ComputeOnce) -> dict[Case, list[int]]:
    """The text of every case by the target alone."""
    texts = json.loads(compute_once("grammars", lambda: generate_references(family / "target-v1", prompts)))
    return dict(zip(CASES, texts, strict=True))


def generate_references(path: Path, prompts: list[list[int]]) -> bytes:
    model: PreTrainedModel = load_model(path, "cpu", "float32")[0]
    size = model.config.vocab_size
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    texts = []
    for case in CASES:
        prompt = prompts[case.prompt]
        processors = make_logits_processors(
            case.parameters, size, len(prompt), frozenset([END]), torch.device("cpu"), tokenizer=tokenizer
        )
        ids = torch.tensor([prompt])
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
            logits_processor=processors,
        )
        texts.append(text[0, len(prompt) :].tolist())
    return json.dumps(texts).encode()


async def generate(
    client: VerifierClient, draft: OnnxDraft | None, prompt: list[int], case: Case, planner: Planner
) -> Generation:
    generation = Generation(draft, client, prompt, case.parameters, max_new_tokens=NEW_TOKENS, planner=planner)
    async for _ in generation:
        pass
    return generation


def test_the_references_match_their_grammars(reference: dict[Case, list[int]], shipped_draft: OnnxDraft) -> None:
    complete = [case for case in CASES if reference[case][-1] == END]
    assert len(complete) > len(CASES) // 2
    for case in complete:
        if "schema" in case.grammar:
            jsonschema.validate(json.loads(shipped_draft.tokenizer.decode(reference[case])), SCHEMA)


async def test_every_draft_and_plan_gives_the_reference_text(
    reference: dict[Case, list[int]],
    target_v1: Target,
    prompts: list[list[int]],
    shipped_draft: OnnxDraft,
    other_draft: OnnxDraft,
) -> None:
    drafts = {"shipped": shipped_draft, "other": other_draft}
    async with serving(target_v1) as server, connected(server.url) as client:
        for number, (draft, plan) in enumerate(COVERING_PLANS):
            cases = cases_for(number)
            generations = await asyncio.gather(
                *(generate(client, drafts[draft], prompts[case.prompt], case, FixedPlanner(plan)) for case in cases)
            )
            for case, generation in zip(cases, generations, strict=True):
                text = reference[case]
                assert generation.ids[len(prompts[case.prompt]) :] == text, (case, plan)
                assert generation.finish == ("stop" if text[-1] == END else "length")


async def test_forced_tokens_cost_no_forward_of_the_target(
    reference: dict[Case, list[int]], target_v1: Target, prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    case, recorder = Case(0, "schema", "greedy"), Recorder(Plan(0, continuation=NEW_TOKENS))
    async with serving(target_v1) as server, connected(server.url) as client:
        generation = await generate(client, shipped_draft, prompts[0], case, recorder)
    assert generation.ids[len(prompts[0]) :] == reference[case]
    (outcome,) = recorder.outcomes
    assert 1 + outcome.further_forwards < len(reference[case]) // 2


class Recorder(FixedPlanner):
    """A fixed plan that records the outcomes of its rounds."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.outcomes: list[Outcome] = []

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def test_forced_tokens_cost_no_step_of_the_draft(prompts: list[list[int]], shipped_draft: OnnxDraft) -> None:
    grammar = grammar_sources.from_choices(["return self.connection"])
    expected = shipped_draft.tokenizer.encode("return self.connection").ids
    sampling = Sampling(grammar=grammar)
    matcher = GrammarMatcher(shipped_draft.grammars.compile(grammar))
    processor = make_processor(sampling, len(prompts[0]), [END], matcher)
    context = shipped_draft.new_context()
    context.sync_to(prompts[0])
    seconds = shipped_draft.run_seconds
    proposal = context.propose(prompts[0], len(expected), sampling, processor=processor)
    assert (proposal.tokens, set(proposal.confidences)) == (expected, {1.0})
    assert shipped_draft.run_seconds == seconds
    # The text goes on differently, as if the target followed another grammar.
    other = [*prompts[0], expected[0], 77]
    assert context.propose(other, 4, Sampling()) == shipped_draft.new_context().propose(other, 4, Sampling())


async def test_random_plans_in_company_of_free_texts(
    reference: dict[Case, list[int]], target_v1: Target, prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    cases = cases_for(1) + cases_for(2) + cases_for(5)
    async with serving(target_v1, VerifierLimits(max_sessions=6)) as server, connected(server.url) as client:
        free = [
            Generation(shipped_draft, client, prompt, Sampling(0.7, seed=5), max_new_tokens=NEW_TOKENS)
            for prompt in prompts
        ]
        generations = await asyncio.gather(
            *(
                generate(client, shipped_draft, prompts[case.prompt], case, RandomPlanner(seed))
                for seed, case in enumerate(cases)
            ),
            *(consume(generation) for generation in free),
        )
    for case, generation in zip(cases, generations, strict=False):
        assert generation.ids[len(prompts[case.prompt]) :] == reference[case], case


async def consume(generation: Generation) -> Generation:
    async for _ in generation:
        pass
    return generation


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_fault_changes_the_text(
    fault: str,
    reference: dict[Case, list[int]],
    target_v1: Target,
    prompts: list[list[int]],
    shipped_draft: OnnxDraft,
) -> None:
    kind, plan = FAULTS[fault]
    evicts = fault == "evict"

    async def check(case: Case) -> int:
        generation = Generation(
            shipped_draft,
            client,
            prompts[case.prompt],
            case.parameters,
            max_new_tokens=NEW_TOKENS,
            planner=FixedPlanner(plan),
        )
        faults = kind(server, client)
        async for _ in generation:
            await faults.after_piece()
        assert generation.ids[len(prompts[case.prompt]) :] == reference[case], case
        return generation.statistics.recoveries

    async with RestartingAddress(target_v1, VerifierLimits(max_sessions=1) if evicts else None) as server:
        transport: httpx.AsyncBaseTransport | None = Twice() if fault.startswith("twice") else None
        async with connected(server.url, transport) as client:
            cases = cases_for(list(FAULTS).index(fault))
            if evicts:
                recoveries = [await check(case) for case in cases]
            else:
                recoveries = await asyncio.gather(*(check(case) for case in cases))
    assert any(recoveries) == (not fault.startswith("twice"))


async def test_a_verifier_that_drafts_gives_the_reference_text(
    reference: dict[Case, list[int]], target_v1: Target, prompts: list[list[int]], family: Path
) -> None:
    service = VerifierService(
        lambda: target_v1,
        VerifierLimits(),
        load_speculation=lambda target: OnnxSpeculation(family / "bundle", target, max_draft_tokens=4, threads=1),
    )
    async with listening(service) as server, connected(server.url) as client:
        for case in cases_for(0) + cases_for(1):
            generation = await generate(client, None, prompts[case.prompt], case, FixedPlanner(Plan(0)))
            assert generation.ids[len(prompts[case.prompt]) :] == reference[case], case


class OtherEnd(Target):
    """A copy of a loaded target whose texts end with another token, which the board's bundle does not name first."""

    def __init__(self, target: Target, path: Path, end: int) -> None:
        vars(self).update(vars(target))
        self.end_ids = frozenset([end])
        self.grammars = TriedGrammarCompiler(lambda: load_tokenizer(path, path), self.vocabulary_size, self.end_ids)


async def test_a_version_with_another_end_token(
    reference: dict[Case, list[int]],
    target_v1: Target,
    prompts: list[list[int]],
    shipped_draft: OnnxDraft,
    family: Path,
) -> None:
    target = OtherEnd(target_v1, family / "target-v1", end=PADDING)
    cases = [case for case in CASES if case.grammar == "schema" and reference[case][-1] == END]
    async with serving(target) as server, connected(server.url) as client:
        for case, plan in zip(cases, itertools.cycle([Plan(4, siblings=2), AHEAD, Plan(0, continuation=8)])):
            generation = await generate(client, shipped_draft, prompts[case.prompt], case, FixedPlanner(plan))
            # The schema's text ends where only an end token may follow, whatever the target calls it.
            assert generation.ids[len(prompts[case.prompt]) :] == [*reference[case][:-1], PADDING]


async def test_what_the_draft_writes_alone_matches_the_grammar(
    prompts: list[list[int]], shipped_draft: OnnxDraft
) -> None:
    async with VerifierClient("http://127.0.0.1:9", deadline=60.0) as client:
        for number, prompt in enumerate(prompts):
            sampling = Sampling(1.0, seed=number, grammar=GRAMMARS["schema"])
            generation = Generation(shipped_draft, client, prompt, sampling, max_new_tokens=120, on_link_loss="draft")
            async for _ in generation:
                pass
            text = shipped_draft.tokenizer.decode(generation.unverified)
            assert generation.finish == "stop"
            jsonschema.validate(json.loads(text), SCHEMA)
