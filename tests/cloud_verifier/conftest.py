"""A verifier in a thread of its own, a client of few words, and the text that the tiny target writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_verifier.reference import decode_alone
from cloud_verifier.target import Target, load_model
from edge_runtime.contract.coupling import Sampling
from edge_runtime.contract.wire import JSON, MSGPACK
from tests.cloud_verifier.talker import GREEDY, Talker, running

Alone = Callable[..., list[int]]


@pytest.fixture(scope="session")
def alone(tiny_path: Path) -> Alone:
    """`alone(prompt, count, sampling)`: the ids that the tiny target writes by itself."""
    model, _, end_ids = load_model(tiny_path, "cpu", "float32")

    def write(prompt: list[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
        return decode_alone(model, prompt, sampling, count, end_ids)

    return write


@pytest.fixture(scope="module")
def url(tiny: Target) -> Iterator[str]:
    """A verifier of the tiny target with the default limits, for a whole module."""
    with running(tiny) as address:
        yield address


@pytest.fixture(params=[MSGPACK, JSON], ids=["msgpack", "json"])
def talker(url: str, request: pytest.FixtureRequest) -> Iterator[Talker]:
    """A client of that verifier, once in each encoding."""
    with Talker(url, request.param) as client:
        yield client
