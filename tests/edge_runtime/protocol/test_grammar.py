"""Masks, forced tokens and rollback of grammars, and the limits that bound what a grammar may cost."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_runtime.protocol import grammar, grammar_sources
from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar import GrammarCompiler, GrammarMatcher, unpack_mask
from tests.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer
from tests.toy_family import FAMILY

END = 0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "color": {"enum": ["red", "green", None]},
        "nested": {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {}, "additionalProperties": False}]},
    },
    "required": ["name", "sizes", "color", "nested"],
    "additionalProperties": False,
}
REGEX = r"(\d{1,3}\.){3}\d{1,3}|localhost(:[1-9]\d*)?"
CHOICES = ["yes", "no", "not at all", "n\u00e9cessaire", 'a "quoted" \\ one']
GRAMMARS = {
    "schema": grammar_sources.from_json_schema(SCHEMA),
    "regex": grammar_sources.from_regex(REGEX),
    "choices": grammar_sources.from_choices(CHOICES),
    "GBNF": grammar_sources.from_grammar(
        'root ::= expr\nexpr ::= term ([-+*] term)*\nterm ::= [1-9] [0-9]* | "(" expr ")"\n'
    ),
}


@pytest.fixture(scope="module")
def toy() -> Tokenizer:
    return Tokenizer.from_file(str(FAMILY / "bundle" / "tokenizer.json"))


@pytest.fixture(scope="module")
def toy_grammars(toy: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(lambda: toy, toy.get_vocab_size(), [END])


@pytest.fixture(scope="module")
def byte_grammars() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer, VOCABULARY_SIZE, [END])


def allowed_ids(matcher: GrammarMatcher, generated: list[int]) -> list[int]:
    mask = matcher.allowed(generated)
    assert mask is not None
    ids: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return ids


def random_text(matcher: GrammarMatcher, pick: random.Random, limit: int = 400) -> list[int] | None:
    """Random ids under the grammar, up to the end token; None if there is none within `limit`."""
    ids: list[int] = []
    while len(ids) < limit:
        allowed = allowed_ids(matcher, ids)
        token = END if END in allowed and pick.random() < 0.3 else pick.choice(allowed)
        if token == END:
            return ids
        ids.append(token)
    return None


def spellings(tokenizer: Tokenizer) -> Iterator[tuple[int, bytes]]:
    """The id and the bytes of every token that is not special."""
    characters = {character: byte for byte, character in enumerate(_byte_characters())}
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if not token.startswith("<|"):
            yield index, bytes(characters[character] for character in token)


def _byte_characters() -> list[str]:
    """How byte-level BPE writes the bytes 0 to 255 (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize("kind", ["toy", "bytes"])
def test_masks_equal_brute_force(
    kind: str, toy: Tokenizer, toy_grammars: GrammarCompiler, byte_grammars: GrammarCompiler
) -> None:
    tokenizer, grammars = (toy, toy_grammars) if kind == "toy" else (byte_tokenizer(), byte_grammars)
    tokens = dict(spellings(tokenizer))
    texts = [choice.encode() for choice in CHOICES]
    matcher = GrammarMatcher(grammars.compile(GRAMMARS["choices"]))
    forced_seen = 0
    for seed in range(20):
        pick, ids, written = random.Random(seed), [], b""
        while True:
            rest = [text[len(written) :] for text in texts if text.startswith(written)]
            expected = {index for index, token in tokens.items() if any(text.startswith(token) for text in rest)}
            expected |= {END} if b"" in rest else set()
            allowed = set(allowed_ids(matcher, ids))
            if forced := matcher.forced(ids, 1):
                # Where the bytes are determined, llguidance leaves the tokenizer's own spelling alone.
                forced_seen += 1
                assert allowed == set(forced) <= expected
            else:
                assert allowed == expected
            token = pick.choice(sorted(allowed))
            if token == END:
                break
            ids.append(token)
            written += tokens[token]
        assert written in texts
    assert forced_seen


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_text_under_a_grammar_matches_it(name: str, toy: Tokenizer, toy_grammars: GrammarCompiler) -> None:
    matcher = GrammarMatcher(toy_grammars.compile(GRAMMARS[name]))
    complete = 0
    for seed in range(30):
        ids = random_text(matcher, random.Random(seed))
        if ids is None:
            continue
        complete += 1
        text = toy.decode(ids, skip_special_tokens=False)
        if name == "schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        elif name == "regex":
            assert re.fullmatch(REGEX, text)
        elif name == "choices":
            assert text in CHOICES
        else:
            eval(text)  # digits, parentheses and operators
    assert complete > 10


@given(data=st.data())
@settings(max_examples=60)
def test_a_mask_is_a_function_of_the_ids_alone(data: st.DataObject, toy_grammars: GrammarCompiler) -> None:
    compiled = toy_grammars.compile(GRAMMARS[data.draw(st.sampled_from(sorted(GRAMMARS)))])
    matcher = GrammarMatcher(compiled)
    paths: list[list[int]] = [[]]
    for _ in range(data.draw(st.integers(1, 12))):
        # Continue, or return to, any text seen so far: a rejected draft, a sibling, a lost session.
        ids = list(data.draw(st.sampled_from(paths)))
        for _ in range(data.draw(st.integers(0, 6))):
            allowed = allowed_ids(matcher, ids)
            ids.append(data.draw(st.sampled_from(allowed)))
        if data.draw(st.booleans()):
            # A token that may not be allowed.
            ids.append(data.draw(st.integers(0, 2053)))
        fresh = GrammarMatcher(compiled)
        mask, expected = matcher.allowed(ids), fresh.allowed(ids)
        assert (mask is None) == (expected is None)
        if mask is not None and expected is not None:
            assert np.array_equal(mask, expected)
            assert matcher.forced(ids, 8) == fresh.forced(ids, 8)
            paths.append(ids)


@pytest.mark.parametrize("name", GRAMMARS)
def test_forced_tokens_are_the_only_ones_allowed(name: str, toy_grammars: GrammarCompiler) -> None:
    matcher = GrammarMatcher(toy_grammars.compile(GRAMMARS[name]))
    seen = 0
    for seed in range(10):
        ids: list[int] = []
        pick = random.Random(seed)
        while len(ids) < 60:
            for index, token in enumerate(forced := matcher.forced(ids, 16)):
                assert allowed_ids(matcher, ids + forced[:index]) == [token]
            seen += len(forced)
            token = pick.choice(allowed_ids(matcher, ids))
            if token == END:
                break
            ids.append(token)
    assert seen or name in ("regex", "GBNF")


def test_end_tokens_are_allowed_exactly_where_the_text_matches(toy: Tokenizer) -> None:
    grammars = GrammarCompiler(lambda: toy, toy.get_vocab_size(), [0, 1])
    matcher = GrammarMatcher(grammars.compile(grammar_sources.from_regex("a{2,3}")))
    one, two, three = (toy.encode("a" * count).ids for count in (1, 2, 3))
    assert not {0, 1} & {*allowed_ids(matcher, one)}
    assert {0, 1} < {*allowed_ids(matcher, two)}
    assert allowed_ids(matcher, three) == [0, 1]
    # Which of several end tokens it is, is the model's choice.
    assert matcher.forced(three, 8) == []
    # With `ignore_eos`, nothing but end tokens follows one.
    assert allowed_ids(matcher, [*two, 1]) == allowed_ids(matcher, [*two, 1, 0]) == [0, 1]
    assert matcher.allowed([*one, 0]) is None
    assert matcher.allowed([*two, 0, *one]) is None
    assert {0, 1} < {*allowed_ids(matcher, two)}


def test_one_end_token_is_forced_after_a_complete_text(toy: Tokenizer, toy_grammars: GrammarCompiler) -> None:
    matcher = GrammarMatcher(toy_grammars.compile(grammar_sources.from_regex("ab")))
    ids = toy.encode("ab").ids
    assert matcher.forced(ids, 8) == [END]
    assert matcher.forced([], 8) == ids
    assert matcher.forced([], 0) == matcher.forced([*ids, END], 8) == []


@pytest.mark.parametrize("logits", [2048 + 77, 2048, 1500])
def test_models_with_more_or_fewer_logits_than_tokens(logits: int, toy: Tokenizer) -> None:
    grammars = GrammarCompiler(lambda: toy, logits, [END])
    full = GrammarCompiler(lambda: toy, toy.get_vocab_size(), [END])
    for source in GRAMMARS.values():
        ids = allowed_ids(GrammarMatcher(full.compile(source)), [])
        matcher = GrammarMatcher(grammars.compile(source))
        assert allowed_ids(matcher, []) == [token for token in ids if token < logits]
        mask = matcher.allowed([])
        assert mask is not None
        assert unpack_mask(mask, logits).shape == (logits,)
        assert all(token < logits for token in matcher.forced([], 16))


def test_a_model_without_end_tokens_has_no_grammars(toy: Tokenizer) -> None:
    grammars = GrammarCompiler(lambda: toy, 2048, [])
    with pytest.raises(GrammarError, match="no end-of-text token"):
        grammars.compile("start: /a/")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "Empty grammar"),
        ("start: nowhere", "unknown name"),
        ("start: /[/", "unclosed character class"),
        (grammar_sources.from_regex("a(?=b)"), "look-around"),
        (grammar_sources.from_json_schema({"type": "card"}), "Invalid type: card"),
        (grammar_sources.from_json_schema({"type": "object", "if": {}}), 'Unimplemented keys: ["if"]'),
        (grammar_sources.from_json_schema({"$ref": "http://elsewhere.example/x"}), "does not fetch"),
        ('{"grammars": []}', "empty grammars"),
        ("{", "EOF"),
    ],
)
def test_an_invalid_grammar_is_refused_with_the_reason(source: str, reason: str, toy_grammars: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match=re.escape(reason)):
        toy_grammars.compile(source)


def test_a_grammar_that_the_tokenizer_cannot_write_is_refused() -> None:
    grammars = GrammarCompiler(byte_tokenizer, 20, [END])
    with pytest.raises(GrammarError, match="no token of this model begins"):
        grammars.compile(grammar_sources.from_choices(["\u00e9"]))


def test_the_lexers_limit_ends_no_text_that_fits_into_it(
    toy: Tokenizer, toy_grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 3000)
    schema = {"type": "array", "items": {"type": "string", "maxLength": 2000}, "minItems": 5}
    compiled = GrammarCompiler(lambda: toy, 2048, [END]).compile(grammar_sources.from_json_schema(schema))
    unlimited = toy_grammars.compile(grammar_sources.from_json_schema(schema))
    for seed in range(12):
        matcher, reference = GrammarMatcher(compiled), GrammarMatcher(unlimited)
        ids: list[int] = []
        pick = random.Random(seed)
        for _ in range(60):
            allowed = allowed_ids(reference, ids)
            assert allowed_ids(matcher, ids) == allowed
            ids.append(pick.choice(allowed))


@pytest.mark.slow
def test_a_budget_ends_a_text_whose_masks_take_too_long(toy_grammars: GrammarCompiler) -> None:
    # The whole text is forced, and llguidance splits it into tokens again for every mask.
    compiled = toy_grammars.compile('start: "' + "ab" * 20_000 + '"\n')
    patient, impatient = GrammarMatcher(compiled), GrammarMatcher(compiled, seconds_per_mask=0.001)
    ids = patient.forced([], 1000)
    with pytest.raises(GrammarError, match="too costly"):
        for index in range(1000):
            impatient.allowed(ids[:index])
    assert patient.allowed(ids) is not None


def test_formats_that_nobody_enforces_are_annotations(toy: Tokenizer, toy_grammars: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "path", "enum": ["a", "b"]},
            "data": {"const": {"format": "path"}},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["format", "data", "day"],
        "additionalProperties": False,
    }
    matcher = GrammarMatcher(toy_grammars.compile(grammar_sources.from_json_schema(schema)))
    for day, matches in (("2024-02-29", True), ("2024-02-31", False), ("today", False)):
        text = f'{{"format": "a", "data": {{"format": "path"}}, "day": "{day}"}}'
        assert (matcher.allowed(toy.encode(text).ids) is not None) == matches
