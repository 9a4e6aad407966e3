"""Fixture for tests that need a target on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.models import make_stored_target


@pytest.fixture
def save_target(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """`save_target(model_type, seed, **config_changes)`: a new target and its directory; see `make_stored_target`."""
    return functools.partial(make_stored_target, tmp_path)
