"""Grammars over the wire: masks in every round, refusals, and texts that are reopened."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.protocol import grammar_sources
from edge_runtime.protocol.messages import ErrorCode
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, opening, running
from tests.models import byte_tokenizer

WORDS = Sampling(temperature=1.0, seed=3, grammar=grammar_sources.from_regex(r"([a-z]{2,5} ){2,4}[0-9]{3}"))
# Its first masks are cheap.
COSTLY_LATER = Sampling(
    logit_bias={0: -100.0}, grammar=grammar_sources.from_regex("(((a|b|c|d){1,1000}){1,1000}){1,1000}")
)
TOO_COSTLY = "start: r0\n" + "".join(f'r{i}: r{i + 1} "a"\n' for i in range(8000)) + 'r8000: "b"\n'


@pytest.fixture(scope="module")
def client(tiny: Target) -> Iterator[ProtocolClient]:
    with running(tiny) as url, ProtocolClient(url) as client:
        yield client


def text_of(ids: list[int]) -> str:
    text: str = byte_tokenizer().decode([token for token in ids if token])
    return text


def test_drafts_and_siblings_are_verified_under_the_grammar(client: ProtocolClient) -> None:
    alone = client.open(sampling=WORDS, n=60)
    assert alone.frame.finish == "stop"
    generated = alone.ids[len(PROMPT) :]
    assert re.fullmatch(r"([a-z]{2,5} ){2,4}[0-9]{3}", text_of(generated))
    session = client.open(sampling=WORDS)
    while not session.frame.finish:
        done = len(session.ids) - len(PROMPT)
        right = generated[done : done + 3]
        # The second draft token is wrong, one that no text may contain, and the right one is its sibling.
        draft = [right[0], 290, *right[2:]] if len(right) > 1 else right
        siblings = {1: [295, right[1]]} if len(right) > 1 else {}
        frame = session.run_round(draft=draft, siblings=siblings)
        assert frame.accepted >= 1
    assert session.ids == alone.ids


def test_a_text_that_is_reopened_goes_on_as_before(client: ProtocolClient) -> None:
    whole = client.open(sampling=WORDS, n=60).ids
    for generated in range(1, len(whole) - len(PROMPT) - 1, 4):
        prompt = whole[: len(PROMPT) + generated]
        session = client.open(prompt, WORDS, generated=generated, n=60)
        assert session.ids == whole


def test_more_forced_tokens_than_a_forward_has_rows(client: ProtocolClient) -> None:
    fixed = "no choice " * 40
    session = client.open(sampling=Sampling(grammar=grammar_sources.from_regex(fixed)), n=512)
    assert (session.frame.finish, text_of(session.ids[len(PROMPT) :])) == ("stop", fixed)
    assert session.frame.further < 10


@pytest.mark.parametrize(
    ("sampling", "prompt", "generated", "reason"),
    [
        (Sampling(grammar="start: nowhere"), PROMPT, 0, "unknown name"),
        (Sampling(grammar=TOO_COSTLY), PROMPT, 0, "too costly"),
        (WORDS, [*PROMPT, 299], 1, "does not match the grammar"),
    ],
    ids=["invalid", "too costly", "another text"],
)
def test_an_opening_is_refused_and_others_are_served(
    sampling: Sampling, prompt: list[int], generated: int, reason: str, client: ProtocolClient
) -> None:
    response = client.post("/v1/sessions", opening(prompt, sampling, generated=generated))
    error = client.expect_error(response, 400, ErrorCode.INVALID_GRAMMAR)
    assert reason in error.message
    assert client.open(sampling=WORDS).frame.tokens
    assert client.open().frame.tokens


def test_a_grammar_that_becomes_too_costly_ends_its_session_alone(client: ProtocolClient) -> None:
    other = client.open(sampling=WORDS)
    session = client.open(sampling=COSTLY_LATER)
    for _ in range(200):
        response = client.post(session.path, request := session.next_round(n=8))
        if response.status_code != 200:
            break
        session.apply_frame(request, client.decode_reply(response, type(session.frame)))
    client.expect_error(response, 400, ErrorCode.INVALID_GRAMMAR)
    client.expect_error(client.post(session.path, session.next_round()), 404, ErrorCode.SESSION_LOST)
    assert other.run_round().tokens
