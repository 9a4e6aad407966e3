"""The claim of the project: whatever is drafted, the text over HTTP is the one that the target writes alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cloud_verifier.model.reference import decode_alone
from edge_runtime.protocol.messages import MSGPACK
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import Alone
from tests.cloud_verifier.protocol_client import PROMPT, Talker
from tests.models import VOCABULARY_SIZE

LENGTH = 40
SAMPLINGS = [
    Sampling(ignore_eos=True),
    Sampling(0.7, seed=1, ignore_eos=True),
    Sampling(1.0, top_k=20, seed=2**64 - 1, ignore_eos=True),
    Sampling(1.0, top_p=0.9, seed=3, ignore_eos=True),
    Sampling(1.3, top_k=50, top_p=0.95, seed=4, ignore_eos=True),
]
names = ["greedy", "T=0.7", "top-k", "top-p", "both"]


def wrong(token: int) -> int:
    return (token + 1) % VOCABULARY_SIZE


msgpack_only = pytest.mark.parametrize("talker", [MSGPACK], indirect=True)


@msgpack_only
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=names)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    ("width", "with_siblings"), [(0, False), (4, False), (4, True)], ids=["no draft", "draft", "draft with siblings"]
)
def test_drafts_that_are_partly_wrong_do_not_change_the_text(
    talker: Talker, alone: Alone, sampling: Sampling, n: int, width: int, with_siblings: bool
) -> None:
    truth = alone(PROMPT, LENGTH + 10, sampling)
    session = talker.open(sampling=sampling, n=n)
    generator = np.random.default_rng(0)
    while (known := len(session.ids) - len(PROMPT)) < LENGTH:
        draft = truth[known : known + width]
        slip = int(generator.integers(width + 1))  # `width`: all are right
        siblings = {}
        if slip < width:
            right, draft[slip] = draft[slip], wrong(draft[slip])
            siblings = {slip: [wrong(draft[slip]), right, 5]} if with_siblings else {}
        frame = session.play(draft=draft, siblings=siblings, n=n)
        assert frame.accepted == slip
        assert len(frame.tokens) == max(n, 1 + len(siblings))
    assert session.ids[len(PROMPT) :] == truth[: len(session.ids) - len(PROMPT)]


@msgpack_only
def test_a_draft_of_nonsense_costs_rounds_and_nothing_else(talker: Talker, alone: Alone) -> None:
    session = talker.open()
    for _ in range(10):
        truth = alone(session.ids, 1)
        assert session.play(draft=[wrong(truth[0])] * 4).tokens == truth
    assert session.ids == PROMPT + alone(PROMPT, 11)


@msgpack_only
def test_close_calls_are_rare_and_small(talker: Talker) -> None:
    """In fp32 hardly ever: a position is named only with a margin under 1e-4."""
    session = talker.open(sampling=SAMPLINGS[1], n=200)
    assert all(margin < 1e-4 and 4 <= position < 204 for position, margin in session.frame.close_calls)
    assert len(session.frame.close_calls) < 5


def test_greedy_is_what_transformers_generates(alone: Alone, tiny_path: Path) -> None:
    """The reference itself, against `generate`."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    generated = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0, len(PROMPT) :].tolist()
    assert alone(PROMPT, 30) == generated


def test_the_reference_stops_at_an_end_token(tiny_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    text = decode_alone(model, PROMPT, Sampling(), 10, frozenset())
    end = text[4]
    stopped = decode_alone(model, PROMPT, Sampling(), 10, frozenset([end]))
    assert stopped == text[: text.index(end) + 1]
    assert decode_alone(model, PROMPT, Sampling(ignore_eos=True), 10, frozenset([end])) == text
