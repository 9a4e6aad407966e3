"""Fixtures: a verifier in a thread of its own, a protocol client, and reference texts of the tiny target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_verifier.engine import rollout
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.registry.registry import Registry
from edge_runtime.protocol.messages import JSON, MSGPACK
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.protocol_client import GREEDY, ProtocolClient, running
from tests.models import save_target

ReferenceText = Callable[..., list[int]]


@pytest.fixture(scope="session", autouse=True)
def quick_polls() -> Iterator[None]:
    """Let verifiers notice changes of their registry at once rather than within a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "POLL_SECONDS", 0.05)
        yield


@pytest.fixture(scope="session")
def reference_text(tiny_path: Path) -> ReferenceText:
    """`reference_text(prompt, count, sampling)`: the ids that the tiny target generates token by token."""
    model, _, end_ids = load_model(tiny_path, "cpu", "float32")
    # Many tests ask for the same texts.
    known: dict[tuple[tuple[int, ...], int, Sampling], list[int]] = {}

    def generate(prompt: list[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
        key = (tuple(prompt), count, sampling)
        if key not in known:
            known[key] = generate_reference(model, prompt, sampling, count, end_ids)
        return list(known[key])

    return generate


@pytest.fixture(scope="module")
def url(tiny: Target) -> Iterator[str]:
    """A verifier of the tiny target with the default limits, shared by a module."""
    with running(tiny) as address:
        yield address


@pytest.fixture(params=[MSGPACK, JSON], ids=["msgpack", "json"])
def client(url: str, request: pytest.FixtureRequest) -> Iterator[ProtocolClient]:
    """A client of that verifier, in each of the two encodings."""
    with ProtocolClient(url, request.param) as protocol_client:
        yield protocol_client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three different tiny targets, v0, v1 and v2, shared by a module."""
    path = tmp_path_factory.mktemp("models")
    for seed in range(3):
        save_target(path / f"v{seed}", seed=seed)
    return path


@pytest.fixture
def registry(models: Path, tmp_path: Path) -> Registry:
    """A registry of v0, to which `latest` leads, and v1."""
    registry = Registry(tmp_path / "registry")
    for name in ("v0", "v1"):
        registry.add(str(models / name))
    return registry
