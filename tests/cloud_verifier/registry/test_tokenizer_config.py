"""Special tokens of checkpoints, and the tokenizer's end token beside those of the generation configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_verifier.model.target import load_model
from cloud_verifier.registry.checkpoint import read_end_ids
from cloud_verifier.registry.tokenizer_config import ends_of_tokenizer, read_special_tokens


def write_config(directory: Path, content: dict[str, Any]) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory


def test_tokens_may_be_objects_and_have_roles_of_their_own(tmp_path: Path) -> None:
    content = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "additional_special_tokens": ["<a>", {"content": "<b>"}, 3],
        "extra_special_tokens": {"image_token": "<image>"},
    }
    assert read_special_tokens(write_config(tmp_path, content)) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<image>",
        "additional_special_tokens": ["<a>", "<b>"],
    }
    assert read_special_tokens(tmp_path / "nothing") == {}


@pytest.mark.parametrize("listed", [True, False])
def test_the_end_token_of_the_tokenizer_ends_a_text(family: Path, tmp_path: Path, listed: bool) -> None:
    """As in vLLM: `<|pad|>` (1) of the tokenizer besides `<|endoftext|>` (0) of the generation configuration."""
    target = tmp_path / "target"
    shutil.copytree(family / "target-v1", target, ignore=shutil.ignore_patterns("special_tokens_map.json"))
    added = {"added_tokens_decoder": {"1": {"content": "<|pad|>"}}} if listed else {}
    write_config(target, {"eos_token": "<|pad|>", **added})
    assert ends_of_tokenizer(target) == {1}
    assert read_end_ids(target) == [0, 1]
    assert load_model(target, "cpu", torch.float32)[2] == {0, 1}
    # A configuration without its added tokens is of a time when this file had the last word.
    (target / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert ends_of_tokenizer(target) == ({1} if listed else {0})
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (target / name).unlink()
    assert ends_of_tokenizer(target) == frozenset()
