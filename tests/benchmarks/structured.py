"""Structured output of the real model: `python -m tests.benchmarks.structured`. 15 to 40 minutes on two cores.

The example family answers 200 questions, each of ten JSON schemas with twenty subjects, in turn under every plan and
temperature below, and the package jsonschema judges the answers. A fifth of the questions, without a schema and with
answers as long, show what the grammar does to acceptance. Prints, by schema and by plan: valid answers; tokens of an
answer; the share of tokens that the grammar forced; the share of draft tokens that were accepted, also without the
forced ones; and draft steps and forwards of the target per token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from typing import Any

import jsonschema
import msgspec
from rich.console import Console
from rich.table import Table

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Outcome, Plan
from edge_runtime.protocol import grammar_sources
from edge_runtime.protocol.bundle import read_bundle, read_chat_format
from edge_runtime.protocol.grammar import GrammarMatcher
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.chat_template import ChatTemplate
from edge_runtime.verifier.client import VerifierClient
from export.example_family.prepare import prepare_family
from tests.benchmarks.speed import run_verifier

SUBJECTS = (
    "a lighthouse", "Lisbon", "a violin", "the planet Mars", "rice", "a bicycle", "Marie Curie", "the number seven",
    "a hedgehog", "coffee", "a library", "winter", "the Nile", "a football match", "Tokyo", "honey", "a sailor",
    "chess", "an umbrella", "the moon",
)  # fmt: skip
SHORT, LONG = {"type": "string", "maxLength": 40}, {"type": "string", "maxLength": 160}


def strict_object(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def list_of(items: dict[str, Any], smallest: int, largest: int) -> dict[str, Any]:
    """An array of so many items."""
    return {"type": "array", "items": items, "minItems": smallest, "maxItems": largest}


# By name: what is asked about a subject, and the schema of the answer.
SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "summary": ("Describe {}.", strict_object(title=SHORT, summary=LONG)),
    "facts": ("Tell me facts about {}.", strict_object(subject=SHORT, facts=list_of(LONG, 2, 3))),
    "class": (
        "What kind of thing is {}?",
        strict_object(category={"enum": ["person", "place", "object", "animal", "idea"]}, certain={"type": "boolean"}),
    ),
    "scores": (
        "Rate {} for a traveler.",
        strict_object(
            beauty={"type": "integer", "minimum": 1, "maximum": 10},
            price={"type": "number", "minimum": 0, "exclusiveMaximum": 1000},
            comment=LONG,
        ),
    ),
    "event": (
        "Invent an event about {}.",
        strict_object(
            name=SHORT,
            date={"type": "string", "format": "date"},
            code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            guests=list_of(strict_object(name=SHORT, age={"type": "integer", "minimum": 18, "maximum": 99}), 1, 3),
        ),
    ),
    "optional": (
        "What do you know about {}?",
        {
            "type": "object",
            "properties": {"name": SHORT, "color": {"type": ["string", "null"], "maxLength": 20}, "note": LONG},
            "required": ["name"],
            "additionalProperties": False,
        },
    ),
    "choice of shapes": (
        "Give an example for {}.",
        strict_object(
            example={
                "anyOf": [
                    strict_object(kind={"const": "text"}, text=LONG),
                    strict_object(kind={"const": "number"}, value={"type": "integer", "minimum": 0, "maximum": 999}),
                ]
            }
        ),
    ),
    "references": (
        "Compare {} with something similar.",
        {
            "$defs": {"thing": strict_object(name=SHORT, size={"enum": ["small", "medium", "large"]})},
            **strict_object(first={"$ref": "#/$defs/thing"}, second={"$ref": "#/$defs/thing"}, difference=LONG),
        },
    ),
    "pairs": (
        "Write questions and answers about {}.",
        list_of(strict_object(question=LONG, answer=LONG), 2, 2),
    ),
    "form": (
        "Fill in the form for {}.",
        strict_object(
            identification=strict_object(
                full_name=SHORT, registration_number={"type": "integer", "minimum": 1, "maximum": 9999}
            ),
            description=strict_object(
                main_material=SHORT, approximate_weight_in_kilograms={"type": "integer", "minimum": 0, "maximum": 500}
            ),
            is_available={"type": "boolean"},
        ),
    ),
}  # fmt: skip
PLANS = (
    Plan(4),
    Plan(6, siblings=2),
    Plan(3, siblings=1, draft_ahead=3, in_flight=2),
    Plan(4, continuation=4),
    Plan(0, continuation=64),
)
SAMPLINGS = (Sampling(seed=1), Sampling(0.7, seed=2))
# Every plan meets every temperature and every schema.
SETTINGS = list(itertools.product(PLANS, SAMPLINGS))
# Enough for the longest answer that a schema admits.
MAX_TOKENS = 400
# Subjects of each schema that are also asked about without it.
FREE_SUBJECTS = 4
# Answers that are generated at the same time.
COMPANY = 4


class AnswerRecord(msgspec.Struct, frozen=True):
    """One answer and what it cost.

    Attributes:
        forced: tokens that the grammar forced.
        drafted, accepted: draft tokens, and how many of them the target accepted.
        drafted_forced: draft tokens that the grammar forced; all of them are accepted if those before them are.
        forwards: forwards of the target.
    """

    text: str
    tokens: int
    forced: int
    drafted: int
    accepted: int
    drafted_forced: int
    accepted_forced: int
    rounds: int
    forwards: int
    seconds: float


class RoundCounter(FixedPlanner):
    """A fixed plan that counts the target's forwards and the draft tokens that the grammar forced.

    Only those have a confidence of exactly 1.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.forwards = self.drafted_forced = self.accepted_forced = 0

    def observe(self, outcome: Outcome) -> None:
        self.forwards += 1 + outcome.further_forwards
        forced = [confidence == 1.0 for confidence in outcome.confidences]
        self.drafted_forced += sum(forced)
        self.accepted_forced += sum(forced[: outcome.accepted])


class Bench:
    """Generates answers of the example family."""

    def __init__(self, draft: OnnxDraft, template: ChatTemplate, client: VerifierClient) -> None:
        self._draft, self._template, self._client = draft, template, client
        self._slots = asyncio.Semaphore(COMPANY)

    async def answer(self, question: str, sampling: Sampling, plan: Plan, max_tokens: int) -> AnswerRecord:
        """Generate one answer of at most `max_tokens`."""
        messages = [{"role": "user", "content": question}]
        prompt = self._template.encode(self._draft.tokenizer, self._template.render(messages))
        counter = RoundCounter(plan)
        async with self._slots:
            started = time.perf_counter()
            generation = Generation(
                self._draft, self._client, prompt, sampling, max_new_tokens=max_tokens, planner=counter
            )
            async for _ in generation:
                pass
            seconds = time.perf_counter() - started
        ids = generation.ids[len(prompt) :]
        return AnswerRecord(
            text=self._draft.tokenizer.decode(ids),
            tokens=len(ids),
            forced=self._count_forced(sampling.grammar, ids),
            drafted=generation.statistics.drafted,
            accepted=generation.statistics.accepted,
            drafted_forced=counter.drafted_forced,
            accepted_forced=counter.accepted_forced,
            rounds=generation.statistics.rounds,
            forwards=counter.forwards,
            seconds=seconds,
        )

    def _count_forced(self, grammar: str, ids: list[int]) -> int:
        if not grammar:
            return 0
        matcher = GrammarMatcher(self._draft.grammars.compile(grammar))
        return sum(bool(matcher.forced(ids[:index], 1)) for index in range(len(ids)))


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether `text` is JSON that matches `schema`, in the judgment of jsonschema, formats included."""
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def summarize(records: list[AnswerRecord]) -> dict[str, str]:
    """Acceptance and costs of some answers."""
    total = {name: sum(getattr(each, name) for each in records) for name in ("tokens", "forced", "rounds", "forwards")}
    drafted, accepted = sum(r.drafted for r in records), sum(r.accepted for r in records)
    forced = sum(r.drafted_forced for r in records), sum(r.accepted_forced for r in records)
    return {
        "tokens": f"{total['tokens'] / len(records):.0f}",
        "forced": share(total["forced"], total["tokens"]),
        "accepted": share(accepted, drafted),
        "of the draft's own": share(accepted - forced[1], drafted - forced[0]),
        "draft steps/token": f"{(drafted - forced[0]) / total['tokens']:.2f}",
        "forwards/token": f"{total['forwards'] / total['tokens']:.2f}",
        "tokens/round": f"{total['tokens'] / total['rounds']:.2f}",
    }


def show(title: str, rows: dict[str, dict[str, str]]) -> None:
    """Print a table whose columns are those of the rows."""
    table = Table(title=title)
    columns = list(next(iter(rows.values())))
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        table.add_row(name, *(row[column] for column in columns))
    Console(width=150).print(table)


async def measure(url: str, draft: OnnxDraft, template: ChatTemplate, subjects: int) -> int:
    """Generate and judge all answers. Return how many are invalid."""
    by_schema: dict[str, list[AnswerRecord]] = {name: [] for name in SCHEMAS}
    free: dict[str, list[AnswerRecord]] = {name: [] for name in SCHEMAS}
    by_plan: dict[str, list[AnswerRecord]] = {}
    free_by_plan: dict[str, list[AnswerRecord]] = {}
    valid: dict[str, int] = {}
    async with VerifierClient(url, deadline=600.0) as client:
        bench = Bench(draft, template, client)
        for number, (name, (question, schema)) in enumerate(SCHEMAS.items()):
            grammar = grammar_sources.from_json_schema(schema)
            questions = [
                f"Answer in JSON with this schema: {json.dumps(schema)}\n{question.format(subject)}"
                for subject in SUBJECTS[:subjects]
            ]
            settings = [SETTINGS[(number + index) % len(SETTINGS)] for index in range(subjects)]
            constrained = await asyncio.gather(
                *(
                    bench.answer(text, msgspec.structs.replace(sampling, grammar=grammar), plan, MAX_TOKENS)
                    for text, (plan, sampling) in zip(questions, settings, strict=True)
                )
            )
            plain = await asyncio.gather(
                *(
                    bench.answer(question.format(subject), sampling, plan, max(16, record.tokens))
                    for subject, (plan, sampling), record in zip(
                        SUBJECTS[:FREE_SUBJECTS], settings, constrained, strict=False
                    )
                )
            )
            by_schema[name], free[name] = constrained, plain
            for (plan, _), record in zip(settings, constrained, strict=True):
                by_plan.setdefault(describe(plan), []).append(record)
            for (plan, _), record in zip(settings, plain, strict=False):
                free_by_plan.setdefault(describe(plan), []).append(record)
            wrong = [record for record in constrained if not is_valid(record.text, schema)]
            valid[name] = len(constrained) - len(wrong)
            for record in wrong:
                print(f"invalid ({name}, {record.tokens} tokens): {record.text!r}", flush=True)
            print(f"{name}: {valid[name]} of {len(constrained)} valid, such as {constrained[0].text}", flush=True)
    answers = [record for records in by_schema.values() for record in records]
    show("By schema", {name: {"valid": f"{valid[name]}/{subjects}"} | summarize(by_schema[name]) for name in SCHEMAS})
    rows = {}
    for label, records in by_plan.items():
        rows[label] = summarize(records)
        if label in free_by_plan:
            rows[f"  free text, {label}"] = summarize(free_by_plan[label])
    show("By plan", rows)
    everything = [record for records in free.values() for record in records]
    show("All answers", {"with a schema": summarize(answers), "free text": summarize(everything)})
    print(f"{sum(valid.values())} of {len(answers)} answers are valid")
    return len(answers) - sum(valid.values())


def describe(plan: Plan) -> str:
    """A plan in a few words."""
    words = [f"K={plan.draft} n={plan.continuation}"]
    words += [f"{plan.siblings} siblings"] * bool(plan.siblings) + ["ahead"] * bool(plan.draft_ahead)
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS), help="of each schema (default: %(default)s)")
    options = parser.parse_args()
    family = prepare_family()
    bundle = read_bundle(family / "bundle")
    draft, template = OnnxDraft(bundle), ChatTemplate(read_chat_format(bundle), family / "bundle")
    with run_verifier(family / "target-v1") as url:
        raise SystemExit(bool(asyncio.run(measure(url, draft, template, options.subjects))))


if __name__ == "__main__":
    main()
