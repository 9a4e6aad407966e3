"""Grammars that would crash, stop or fill a process end a child process instead, and are refused."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from edge_runtime.protocol import grammar_sources
from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar import define_tokenizer
from edge_runtime.protocol.grammar_trial import GrammarTrial, TrialModel
from tests.toy_family import FAMILY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> TrialModel:
    return TrialModel(define_tokenizer(Tokenizer.from_file(str(FAMILY / "bundle" / "tokenizer.json"))), 2048, [0])


@pytest.fixture(scope="module")
def trial() -> Iterator[GrammarTrial]:
    trial = GrammarTrial()
    yield trial
    trial.close()


def chain(rules: int, body: str) -> str:
    """A chain of rules or terminals, each of which refers to the next."""
    name = "R" if body[0].isupper() else "r"
    lines = [body.format(index, index + 1) for index in range(rules)]
    return f"start: {name}0\n" + "".join(f"{line}\n" for line in lines) + f'{name}{rules}: "b"\n'


HOSTILE = {
    "stack": chain(8000, 'r{0}: r{1} "a"'),
    "stack of terminals": chain(8000, 'R{0}: R{1} "a"'),
    "stack of references": grammar_sources.from_json_schema(
        {
            "$ref": "#/$defs/d0",
            "$defs": {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1000)}
            | {"d1000": {"type": "null"}},
        }
    ),
    "memory": grammar_sources.from_regex("a?" * 8000),
    "time": '{"grammars": ['
    + ",".join(f'{{"name": "g{i}", "lark_grammar": "start: \\"a\\" @g{i + 1}"}}' for i in range(1000))
    + ',{"name": "g1000", "lark_grammar": "start: \\"a\\""}]}',
    "time for masks": 'start: "' + "ab" * 100_000 + '"\n',
    "growth": chain(40, "R{0}: R{1} R{1}"),
    "product of patterns": grammar_sources.from_json_schema(
        {"allOf": [{"type": "string", "pattern": f"^.*a.{{{count}}}$"} for count in range(30)]}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_and_others_go_on(name: str, trial: GrammarTrial, model: TrialModel) -> None:
    with pytest.raises(GrammarError, match="too costly"):
        trial.run(model, HOSTILE[name])
    trial.run(model, grammar_sources.from_json_schema({"type": "object"}))


def test_an_invalid_grammar_is_refused_with_the_reason(trial: GrammarTrial, model: TrialModel) -> None:
    with pytest.raises(GrammarError, match="unknown name"):
        trial.run(model, "start: nowhere")


def test_a_costly_but_ordinary_schema_is_accepted(trial: GrammarTrial, model: TrialModel) -> None:
    properties = {f"property_{number}": {"type": "string", "maxLength": 100} for number in range(300)}
    trial.run(model, grammar_sources.from_json_schema({"type": "object", "properties": properties}))


def test_the_child_ends_when_no_grammar_needs_it(model: TrialModel) -> None:
    trial = GrammarTrial(idle_seconds=0.1)
    trial.run(model, "start: /a/")
    while trial.running:
        time.sleep(0.01)
    trial.run(model, "start: /b/")
    trial.close()
