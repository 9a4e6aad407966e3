"""A verifier in a thread of its own, a client of few words, and the text that the tiny target writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.registry.registry import Registry
from edge_runtime.protocol.messages import JSON, MSGPACK
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.protocol_client import GREEDY, ProtocolClient, running
from tests.models import save_target

Alone = Callable[..., list[int]]


@pytest.fixture(scope="session")
def alone(tiny_path: Path) -> Alone:
    """`alone(prompt, count, sampling)`: the ids that the tiny target writes by itself."""
    model, _, end_ids = load_model(tiny_path, "cpu", "float32")

    def write(prompt: list[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
        return generate_reference(model, prompt, sampling, count, end_ids)

    return write


@pytest.fixture(scope="module")
def url(tiny: Target) -> Iterator[str]:
    """A verifier of the tiny target with the default limits, for a whole module."""
    with running(tiny) as address:
        yield address


@pytest.fixture(params=[MSGPACK, JSON], ids=["msgpack", "json"])
def talker(url: str, request: pytest.FixtureRequest) -> Iterator[ProtocolClient]:
    """A client of that verifier, once in each encoding."""
    with ProtocolClient(url, request.param) as client:
        yield client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of v0, v1 and v2, tiny targets that differ, for a whole module."""
    path = tmp_path_factory.mktemp("models")
    for seed in range(3):
        save_target(path / f"v{seed}", seed=seed)
    return path


@pytest.fixture
def registry(models: Path, tmp_path: Path) -> Registry:
    """One of these, with v0, which `latest` leads to, and v1."""
    registry = Registry(tmp_path / "registry")
    for name in ("v0", "v1"):
        registry.add(str(models / name))
    return registry
