"""Exactness over HTTP: whatever is drafted, the text equals reference decoding by the target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cloud_verifier.model.reference import generate_reference
from edge_runtime.protocol.messages import MSGPACK
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient
from tests.models import VOCABULARY_SIZE

LENGTH = 40
SAMPLINGS = [
    Sampling(ignore_eos=True),
    Sampling(0.7, seed=1, ignore_eos=True),
    Sampling(1.0, top_k=20, seed=2**64 - 1, ignore_eos=True),
    Sampling(1.0, top_p=0.9, seed=3, ignore_eos=True),
    Sampling(1.3, top_k=50, top_p=0.95, seed=4, ignore_eos=True),
    Sampling(1.3, seed=4, ignore_eos=True, min_p=0.05, repetition_penalty=1.3, logit_bias={7: 3.0, 20: -100.0}),
    Sampling(ignore_eos=True, presence_penalty=1.5, frequency_penalty=0.9, min_tokens=LENGTH + 50, stop_ids=[7, 31]),
]
SAMPLING_NAMES = ["greedy", "T=0.7", "top-k", "top-p", "both", "processed", "processed, greedy"]


def other_token(token: int) -> int:
    return (token + 1) % VOCABULARY_SIZE


msgpack_only = pytest.mark.parametrize("client", [MSGPACK], indirect=True)


@pytest.mark.slow
@msgpack_only
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=SAMPLING_NAMES)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    ("width", "with_siblings"), [(0, False), (4, False), (4, True)], ids=["no draft", "draft", "draft with siblings"]
)
def test_partly_rejected_drafts_do_not_change_the_text(
    client: ProtocolClient, reference_text: ReferenceText, sampling: Sampling, n: int, width: int, with_siblings: bool
) -> None:
    reference = reference_text(PROMPT, LENGTH + 10, sampling)
    session = client.open(sampling=sampling, n=n)
    generator = np.random.default_rng(0)
    while (known := len(session.ids) - len(PROMPT)) < LENGTH:
        draft = reference[known : known + width]
        # Index of the first rejected token; `width` if all are accepted.
        rejected = int(generator.integers(width + 1))
        siblings = {}
        if rejected < width:
            correct, draft[rejected] = draft[rejected], other_token(draft[rejected])
            siblings = {rejected: [other_token(draft[rejected]), correct, 5]} if with_siblings else {}
        frame = session.run_round(draft=draft, siblings=siblings, n=n)
        assert frame.accepted == rejected
        assert len(frame.tokens) == max(n, 1 + len(siblings))
    assert session.ids[len(PROMPT) :] == reference[: len(session.ids) - len(PROMPT)]


@msgpack_only
def test_drafts_that_are_always_rejected_cost_rounds_only(
    client: ProtocolClient, reference_text: ReferenceText
) -> None:
    session = client.open()
    for _ in range(10):
        reference = reference_text(session.ids, 1)
        assert session.run_round(draft=[other_token(reference[0])] * 4).tokens == reference
    assert session.ids == PROMPT + reference_text(PROMPT, 11)


@pytest.mark.slow
@msgpack_only
def test_close_calls_are_rare_and_small(client: ProtocolClient) -> None:
    """In float32 few positions are reported, all with a margin below 1e-4."""
    session = client.open(sampling=SAMPLINGS[1], n=200)
    assert all(margin < 1e-4 and 4 <= position < 204 for position, margin in session.frame.close_calls)
    assert len(session.frame.close_calls) < 5


def test_log_probabilities_of_all_tokens_of_a_round(
    client: ProtocolClient, reference_text: ReferenceText, tiny_path: Path
) -> None:
    """Of accepted tokens, a sibling and the target's own, in both encodings, before the logits are processed."""
    sampling = Sampling(0.7, seed=1, ignore_eos=True, logit_bias={7: 5.0})
    text = reference_text(PROMPT, 12, sampling)
    session = client.open(sampling=sampling, logprobs=3, draft=[*text[:2], other_token(text[2])], n=3)
    entries = session.frame.logprobs
    assert (session.frame.accepted, len(session.frame.tokens), len(entries)) == (2, 3, 5)
    frame = session.run_round(draft=[other_token(text[5])], siblings={0: [text[5]]}, n=1)
    entries = entries + frame.logprobs
    assert (frame.accepted, frame.tokens, len(entries)) == (0, text[5:7], 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    with torch.inference_mode():
        rows = model(torch.tensor([PROMPT + text])).logits[0, len(PROMPT) - 1 :].double().log_softmax(-1)
    for row, token, entry in zip(rows, text, entries, strict=False):
        assert entry.logprob == pytest.approx(row[token].item(), abs=3e-4)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
    assert session.run_round(n=2).logprobs
    assert not client.open(n=4).frame.logprobs


def test_greedy_reference_decoding_equals_generate(reference_text: ReferenceText, tiny_path: Path) -> None:
    """The reference itself is checked against transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    generated = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0, len(PROMPT) :].tolist()
    assert reference_text(PROMPT, 30) == generated


def test_reference_decoding_stops_at_an_end_token(tiny_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    text = generate_reference(model, PROMPT, Sampling(), 10, frozenset())
    end = text[4]
    stopped = generate_reference(model, PROMPT, Sampling(), 10, frozenset([end]))
    assert stopped == text[: text.index(end) + 1]
    assert generate_reference(model, PROMPT, Sampling(ignore_eos=True), 10, frozenset([end])) == text
