"""Loading targets: version, identity and vocabulary; adapters; and checkpoints that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.target import Target
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.errors import TargetError
from tests.models import VOCABULARY_SIZE, save_target


def load(path: Path, **options: Any) -> Target:
    return Target(path, **{"device": "cpu", "dtype": torch.float32, **options})


def test_properties_of_a_target(tiny: Target, tiny_path: Path) -> None:
    assert tiny.name == tiny_path.name
    assert tiny.version.startswith(f"{tiny.name}@")
    assert (tiny.vocabulary_size, tiny.context, tiny.end_ids) == (VOCABULARY_SIZE, 512, {0})


def copy_with_weights(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copy a checkpoint and change its weights."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_version_follows_from_the_contents(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    same = load(shutil.copytree(tiny_path, tmp_path / "copy" / tiny_path.name))
    assert same.version == tiny.version

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3

    other = load(copy_with_weights(tiny_path, tmp_path / "other" / tiny_path.name, nudge))
    assert other.name == tiny.name
    assert other.version != tiny.version
    assert other.vocabulary == tiny.vocabulary


def test_shared_identity_depends_on_the_shared_tensors_only(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    def change_first_block(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3

    other = load(copy_with_weights(tiny_path, tmp_path / "other", change_first_block))
    assert other.shared_identity("anchor", 1) == tiny.shared_identity("anchor", 1)
    assert other.shared_identity("anchor", 2) != tiny.shared_identity("anchor", 2)
    assert other.shared_identity("prefix", 1) != tiny.shared_identity("prefix", 1)
    assert other.shared_identity("standalone", 0) == tiny.shared_identity("standalone", 0)


def test_shared_identity_does_not_depend_on_the_compute_dtype(tiny: Target, tiny_path: Path) -> None:
    half = load(tiny_path, dtype=torch.bfloat16)
    assert half.shared_identity("anchor", 1) == tiny.shared_identity("anchor", 1)
    assert half.version == tiny.version


def save_adapter(base: Path, path: Path, **options: Any) -> Path:
    """Save a LoRA adapter with random weights in both of its matrices."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(path)
    return path


def test_an_adapter_is_another_version_of_its_base(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    path = save_adapter(tiny_path, tmp_path / "tuned", target_modules=["q_proj", "up_proj"], layers_to_transform=[0])
    tuned = load(path)
    assert tuned.name == "tuned"
    assert tuned.version.split("@")[1] != tiny.version.split("@")[1]
    assert tuned.vocabulary == tiny.vocabulary
    tree = TokenTree(17, 1, [30, 205, 9, 77, 150, 3], {})
    logits = [
        target.runner.logits(KVCachePool(target.runner.shape, 64), [target.tree_segment(CachedSequence(), tree)])[0]
        for target in (tuned, tiny)
    ]
    assert not torch.allclose(*logits, atol=1e-2)
    # Block 0 changed; block 1, the norm and the head, which an anchor draft of one block shares, did not.
    assert tuned.shared_identity("anchor", 1) == tiny.shared_identity("anchor", 1)
    assert tuned.shared_identity("anchor", 2) != tiny.shared_identity("anchor", 2)
    assert tuned.shared_identity("prefix", 1) != tiny.shared_identity("prefix", 1)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "use_dora": True},
    ],
    ids=["head", "embedding", "last block", "whole head", "dora"],
)
def test_an_adapter_of_shared_tensors_changes_the_identity(
    tiny: Target, tiny_path: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tuned = load(save_adapter(tiny_path, tmp_path / "tuned", **options))
    assert tuned.shared_identity("anchor", 1) != tiny.shared_identity("anchor", 1)


def test_an_ia3_adapter_of_shared_tensors_changes_the_identity(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "tuned")
    tuned = load(tmp_path / "tuned")
    assert tuned.shared_identity("anchor", 1) != tiny.shared_identity("anchor", 1)


def test_an_adapter_finds_its_base_by_a_relative_path(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    """It is relative to the adapter's own directory, so that a family of models can be moved."""
    base = shutil.copytree(tiny_path, tmp_path / "base")
    path = save_adapter(base, tmp_path / "tuned", target_modules=["q_proj"])
    rename_base(path, "../base")
    assert load(path).shared_identity("standalone", 0) == tiny.shared_identity("standalone", 0)


def rename_base(adapter: Path, name: object) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))


def test_an_adapter_without_its_base_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    path = save_adapter(tiny_path, tmp_path / "tuned", target_modules=["q_proj"])
    rename_base(path, "someone/somewhere")
    with pytest.raises(TargetError, match="names the base model 'someone/somewhere', which is not a directory"):
        load(path)


@pytest.mark.parametrize("window", [64, 512])
def test_a_sliding_window_does_not_bound_the_context(tmp_path: Path, window: int) -> None:
    assert load(save_target(tmp_path / "model", "mistral", sliding_window=window)).context == 512


def test_a_context_beyond_training_is_refused(tiny_path: Path) -> None:
    with pytest.raises(TargetError, match="trained for 512 tokens, not 513"):
        load(tiny_path, context=513)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no target at .*nowhere: give the directory of a Hugging Face checkpoint"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "unknown type"}'),
        ("config.json", "[]"),
        ("tokenizer.json", "{"),
        ("model.safetensors", "short"),
        ("adapter_config.json", "{"),
        ("adapter_config.json", "{}"),
    ],
    ids=str,
)
def test_a_broken_file_is_refused(tiny_path: Path, tmp_path: Path, file: str, contents: str) -> None:
    path = shutil.copytree(tiny_path, tmp_path / "broken")
    (path / file).write_text(contents)
    with pytest.raises(TargetError, match=str(path)):
        load(path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_refused(tiny_path: Path, tmp_path: Path, file: str) -> None:
    path = shutil.copytree(tiny_path, tmp_path / "incomplete")
    (path / file).unlink()
    with pytest.raises(TargetError, match=file if file == "tokenizer.json" else "no safetensors weights"):
        load(path)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetError, match="empty"):
        load(tmp_path / "empty")


def test_weights_that_do_not_fit_the_configuration_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_path, tmp_path / "odd")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(TargetError, match="does not load"):
        load(path)


def test_a_checkpoint_with_missing_tensors_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    def remove(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(TargetError, match="up_proj"):
        load(copy_with_weights(tiny_path, tmp_path / "incomplete", remove))


def test_weights_with_nan_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    def set_nan(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = torch.nan

    with pytest.raises(TargetError, match="nan or infinite"):
        load(copy_with_weights(tiny_path, tmp_path / "nan", set_nan))
