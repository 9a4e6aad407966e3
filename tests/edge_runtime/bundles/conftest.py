"""Bundles, a store and keys."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_runtime.bundles.store import BundleStore
from export.bundle.sign import generate_key_pair
from tests.edge_runtime.bundles.bundle_files import change


@pytest.fixture
def shipped(family: Path) -> Path:
    return family / "bundle"


@pytest.fixture
def another(shipped: Path, tmp_path: Path) -> Path:
    """The shipped bundle under another name."""
    return change(shutil.copytree(shipped, tmp_path / "another"), name="another")


@pytest.fixture
def unfit(shipped: Path, tmp_path: Path) -> Path:
    """A bundle whose hashes are right and whose graph is nonsense."""
    bundle = shutil.copytree(shipped, tmp_path / "unfit")
    (bundle / "model.onnx").write_bytes(b"nonsense")
    return change(bundle, name="unfit")


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "store")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`maker.key`, `maker.pub`, `other.key`, `other.pub`."""
    folder = tmp_path_factory.mktemp("keys")
    generate_key_pair(folder / "maker.key")
    generate_key_pair(folder / "other.key")
    return folder
