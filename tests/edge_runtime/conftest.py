"""Draft bundles, exported for real, and a verifier."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge_runtime.draft.model import OnnxDraft

if TYPE_CHECKING:
    from cloud_verifier.model.target import Target

TEXT = "the quick brown fox jumps over the lazy dog; " * 4
# Directory with the bundles of `tiny_bundle`, for machines that cannot export them (`make test-arm`).
EXPORTED_VARIABLE = "FLEXSPEC_TEST_BUNDLES"


@pytest.fixture(scope="session")
def verifier(target_v1: Target) -> Iterator[str]:
    """URL of a verifier of the toy family's first version, which no test stops."""
    from tests.cloud_verifier.protocol_client import running

    with running(target_v1) as url:
        yield url


@pytest.fixture(scope="session", params=["fused", "concat"])
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target as its own draft, as either kind of graph."""
    if EXPORTED_VARIABLE in os.environ:
        return Path(os.environ[EXPORTED_VARIABLE], request.param)
    output = tmp_path_factory.mktemp("bundles") / request.param
    return export_tiny_bundle(request.getfixturevalue("tiny_path"), request.param, output)


def export_tiny_bundle(target: Path, graph: str, output: Path) -> Path:
    """Export the target in the directory `target` as its own draft, as this kind of graph. Returns `output`."""
    from export.bundle.build import BundleConfig, make_bundle

    make_bundle(BundleConfig(target, target, graph, "fp32", TEXT), output, lambda step: None)
    return output


@pytest.fixture(scope="session")
def tiny_draft(tiny_bundle: Path) -> OnnxDraft:
    return OnnxDraft.load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def shipped_draft(family: Path) -> OnnxDraft:
    return OnnxDraft.load(family / "bundle", threads=1)


@pytest.fixture(scope="session")
def other_draft(family: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxDraft:
    """A draft that has nothing to do with the shipped one: target v1 with its upper half cut off, fp32, optimum's."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from export.bundle.build import BundleConfig, make_bundle

    model = AutoModelForCausalLM.from_pretrained(family / "target-v1", dtype=torch.float32)
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    directory = tmp_path_factory.mktemp("other")
    model.save_pretrained(directory / "model")
    order = BundleConfig(family / "target-v1", directory / "model", "concat", "fp32", TEXT)
    make_bundle(order, directory / "bundle", lambda step: None)
    return OnnxDraft.load(directory / "bundle", threads=1)
