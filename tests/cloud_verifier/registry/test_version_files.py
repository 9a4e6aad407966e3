"""The identity of a version covers all that is loaded, and nothing else is loaded; configurations have bounds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cloud_verifier.model.inspection import inspect_target
from cloud_verifier.model.pretrained import load_text_config
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.registry.checkpoint import base_directory
from cloud_verifier.registry.compatibility import check_compatibility
from cloud_verifier.registry.version_files import list_version_files, loading_directory, version_hash
from edge_runtime.protocol.errors import TargetError
from tests.cloud_verifier.model.architectures import save_architecture
from tests.models import CodeInPickle

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint in one file and in shards, an adapter of it, and changes to it."""
    root = tmp_path_factory.mktemp("versions")
    base = save_architecture(root / "base", "llama")
    sharded = shutil.copytree(base, root / "sharded")
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="50KB")
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapter.save_pretrained(root / "adapter")
    (root / "changes").mkdir()
    name, tensor = next(
        (name, tensor) for name, tensor in load_file(base / "model.safetensors").items() if "norm" in name
    )
    save_file({name: tensor * 2}, root / "changes" / "changed.safetensors")
    (root / "changes" / "changes.json").write_text('{"format_version": 1, "base": "../base"}')
    return root


VERSIONS = ["base", "sharded", "adapter", "changes"]


def logits_of(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_model(path, "cpu", "float32")[0](IDS).logits
    return logits


def files_of(path: Path) -> list[Path]:
    files = list_version_files(path, base_directory(path))
    return [*files.base, *files.own]


def hash_of(path: Path) -> str:
    return version_hash(path, base_directory(path))


@pytest.mark.parametrize("name", VERSIONS)
def test_the_listed_files_are_all_that_a_version_needs(root: Path, tmp_path: Path, name: str) -> None:
    for file in files_of(root / name):
        target = tmp_path / file.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    settings = tmp_path / name / "adapter_config.json"
    if settings.exists():
        for directory in (root, tmp_path):
            file = directory / name / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../base"}))
    assert hash_of(tmp_path / name) == hash_of(root / name)
    assert torch.equal(logits_of(tmp_path / name), logits_of(root / name))


@pytest.mark.parametrize("name", VERSIONS)
def test_every_listed_file_is_part_of_the_identity(root: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    before = hash_of(copy / name)
    for file in files_of(copy / name):
        content = file.read_bytes()
        # In JSON, a blank at the end; in safetensors, the last value.
        file.write_bytes(content + b" " if file.suffix == ".json" else content[:-1] + bytes([content[-1] ^ 1]))
        assert hash_of(copy / name) != before, file.name
        file.write_bytes(content)
    assert hash_of(copy / name) == before


@pytest.mark.parametrize("name", VERSIONS)
def test_other_files_are_neither_loaded_nor_hashed(root: Path, tmp_path: Path, name: str) -> None:
    """Whatever transformers or peft would look for."""
    copy = shutil.copytree(root, tmp_path / "copy")
    version, logits = hash_of(copy / name), logits_of(copy / name)
    weights = {key: tensor * 3 for key, tensor in load_file(root / "base" / "model.safetensors").items()}
    for directory in {copy / name, copy / "base"}:
        for other in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin"):
            torch.save({"weight": CodeInPickle(tmp_path / "code ran")}, directory / other)
        for other in ("other.safetensors", "model.fp16.safetensors", "consolidated.safetensors"):
            save_file(weights, directory / other, {"format": "pt"})
        (directory / "config.4.0.0.json").write_text("{}")
        (directory / "quantize_config.json").write_text("{}")
    assert hash_of(copy / name) == version
    assert torch.equal(logits_of(copy / name), logits)
    assert not (tmp_path / "code ran").exists()
    findings = {finding.subject: finding for finding in inspect_target(copy / name)}
    assert "'adapter_model.bin'" in findings["other weights"].found
    assert "never loaded" in findings["other weights"].found


@pytest.mark.parametrize(
    ("name", "weights", "pickled"),
    [("base", "model.safetensors", "pytorch_model.bin"), ("adapter", "adapter_model.safetensors", "adapter_model.bin")],
)
@pytest.mark.parametrize("unrelated", [None, "other.safetensors"])
def test_pickled_weights_are_refused_by_name(
    root: Path, tmp_path: Path, name: str, weights: str, pickled: str, unrelated: str | None
) -> None:
    """By everything that loads, names or admits a version; also beside safetensors that are not the version's."""
    path = shutil.copytree(root, tmp_path / "copy") / name
    torch.save(load_file(path / weights), path / pickled)
    (path / weights).rename(path / unrelated) if unrelated else (path / weights).unlink()
    for use in (
        lambda: Target(path, device="cpu", dtype=torch.float32),
        lambda: load_model(path, "cpu", "float32"),
        lambda: check_compatibility(path, []),
        lambda: hash_of(path),
    ):
        with pytest.raises(TargetError, match=rf"only '{pickled}', and pickled weights are never loaded"):
            use()
    assert any(finding.state == "fault" and pickled in finding.found for finding in inspect_target(path))


def test_it_must_be_clear_how_a_version_is_stored(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root, tmp_path / "copy") / "adapter"
    shutil.copy(root / "changes" / "changes.json", path)
    with pytest.raises(TargetError, match=r"holds changes\.json and adapter_config\.json"):
        hash_of(path)


def test_an_index_names_safetensors_alone(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "sharded", tmp_path / "sharded")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "pytorch_model.bin"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TargetError, match=r"names 'pytorch_model\.bin', which is not safetensors"):
        hash_of(path)


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    settings = json.loads((path / "config.json").read_text())
    change(settings)
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformers_weights", "other.safetensors"),
        ("transformers_weights", "/srv/other.safetensors"),
        ("configuration_files", ["config.4.0.0.json"]),
        ("attn_implementation", "someone/kernels"),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", 10**12),
        ("vocab_size", 0),
        ("hidden_size", 10**30),
        ("num_attention_heads", -4),
        ("intermediate_size", 10**9),
        ("text_config", {"num_hidden_layers": 10**9}),
    ],
)
def test_absurd_configurations_are_refused_in_a_sentence(root: Path, tmp_path: Path, name: str, value: object) -> None:
    path = edit_config(
        shutil.copytree(root / "base", tmp_path / "copy"), lambda settings: settings.update({name: value})
    )
    message = rf"config\.json is refused: Expected .* - at `\$\.({name}|num_hidden_layers)`; copy the model again"
    for use in (
        lambda: Target(path, device="cpu", dtype=torch.float32),
        lambda: check_compatibility(path, []),
        lambda: load_text_config(path),
    ):
        with pytest.raises(TargetError, match=message):
            use()
    (finding,) = inspect_target(path)
    assert (finding.state, finding.subject) == ("fault", "configuration")


def test_a_directory_to_load_from_disappears(root: Path) -> None:
    with loading_directory([root / "base" / "config.json"]) as directory:
        assert [file.name for file in directory.iterdir()] == ["config.json"]
    assert not directory.exists()
    assert (root / "base" / "config.json").exists()


def test_a_configuration_describes_no_more_than_its_weights_can_hold(root: Path, tmp_path: Path) -> None:
    """Within the bounds of each setting, and still terabytes, which would be filled with made-up weights."""
    path = edit_config(
        shutil.copytree(root / "base", tmp_path / "copy"),
        lambda settings: settings.update(num_hidden_layers=200, intermediate_size=1 << 19),
    )
    with pytest.raises(TargetError, match=r"describes \d{10,} parameters, and the weights have \d+ bytes"):
        load_model(path, "cpu", "float32")
    findings = {finding.subject: finding for finding in inspect_target(path)}
    assert (findings["tier"].state, "parameters" in findings["tier"].found) == ("fault", True)
