"""What the gate lets in: versions of the shipped family, and tiny ones in which one thing differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from cloud_verifier.model.target import Target
from cloud_verifier.registry.checkpoint import end_ids_of, shared_fingerprints
from cloud_verifier.registry.compatibility import Examined, examine
from edge_runtime.protocol.bundle import Manifest, SharedTensors, read_bundle, write_manifest
from edge_runtime.protocol.errors import BundleCorrupt, TargetError
from export.draft.base_target import load_target
from export.example_family.evolution import break_contract, save_changes

Change = Callable[[Path], None]


def test_the_family_evolves_within_the_contract(family: Path) -> None:
    kinds = {"target-v1": "checkpoint", "target-v2": "adapter", "target-v3": "adapter", "target-v4": "changes"}
    for name, kind in kinds.items():
        examined = examine(family / name, [family / "bundle"], family / "target-v1")
        assert (examined.compatible, examined.kind, examined.report()) == (True, kind, "")
        identity = read_bundle(family / "bundle").manifest.shared.identity
        assert [(fit.draft, fit.identity) for fit in examined.fits] == [(str(family / "bundle"), identity)]


def test_what_the_gate_says_is_what_a_session_is_told(family: Path, tmp_path: Path, target_v1: Target) -> None:
    v5 = tmp_path / "target-v5"
    break_contract(family / "target-v1", v5, str(family / "target-v1"))
    identity = read_bundle(family / "bundle").manifest.shared.identity
    assert target_v1.identity_like(identity) == identity
    assert examine(family / "target-v1", []).version == target_v1.version
    examined = examine(v5, [family / "bundle"], family / "target-v1")
    loaded = Target(v5, device="cpu", dtype=torch.float32)
    assert not examined.compatible
    assert loaded.identity_like(identity) != identity
    assert loaded.version == examined.version


def test_a_broken_contract_names_the_tensor(family: Path, tmp_path: Path) -> None:
    v5 = tmp_path / "target-v5"
    break_contract(family / "target-v1", v5, str(family / "target-v1"))
    (difference,) = examine(v5, [family / "bundle"]).fits[0].differences
    assert (difference.what, difference.name) == ("tensor", "model.norm.weight")
    assert "other values" in difference.why


def test_blocks_that_no_draft_shares_may_change_and_shared_ones_may_not(family: Path, tmp_path: Path) -> None:
    shared = read_bundle(family / "bundle").manifest.shared.fingerprints
    model = load_target(family / "target-v1", torch.device("cpu"))
    names = [name for name, _ in model.named_parameters()]
    for name, fits in (("model.layers.2.mlp.up_proj.weight", True), (sorted(shared)[0], False)):
        assert name in names
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        save_changes(model, family / "target-v1", tmp_path / name, str(family / "target-v1"))
        examined = examine(tmp_path / name, [family / "bundle"])
        assert (examined.kind, examined.compatible) == ("changes", fits)


def test_an_adapter_on_a_shared_module_does_not_fit(family: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(family / "target-v2", tmp_path / "target-v9")
    adapter = load_file(copy / "adapter_model.safetensors")
    moved = {name.replace(".layers.6.", ".layers.7."): value for name, value in adapter.items()}
    moved |= {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 384)}
    save_file(moved, copy / "adapter_model.safetensors")
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(family / "target-v1")
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    names = {d.name: d.why for d in examine(copy, [anchor_of_one_block(family, tmp_path)]).fits[0].differences}
    assert "model.layers.7.mlp.up_proj.weight" in names
    assert set(names.values()) == {"an adapter changes it"}
    assert not any(".layers.5." in name or "layernorm" in name for name in names)


def anchor_of_one_block(family: Path, tmp_path: Path) -> Path:
    """The shipped bundle, if it shares the last block; else one that says it does."""
    base = family / "target-v1"
    fingerprints = shared_fingerprints(base, base, "anchor", 1, 8)
    return rewritten(family, tmp_path / "one", lambda said: {"shared": SharedTensors("anchor", 1, fingerprints)})


def rewritten(family: Path, path: Path, change: Callable[[Manifest], dict[str, object]]) -> Path:
    """A copy of the shipped bundle whose manifest says something else."""
    shutil.copytree(family / "bundle", path)
    manifest = read_bundle(path, verify=False).manifest
    write_manifest(path, msgspec.structs.replace(manifest, **change(manifest)))
    return path


def changed(tmp_path: Path, family: Path, change: Change) -> Examined:
    """What the gate says of target v1, its small files changed."""
    copy = shutil.copytree(family / "target-v1", tmp_path / "target-v1")
    change(copy)
    return examine(copy, [family / "bundle"], family / "target-v1")


def edited(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    contents = json.loads(path.read_text(encoding="utf-8"))
    change(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")


def test_tokens_that_moved_are_named(tmp_path: Path, family: Path) -> None:
    def swap(copy: Path) -> None:
        def swapped(contents: dict) -> None:  # type: ignore[type-arg]
            vocabulary = contents["model"]["vocab"]
            by_id = {index: token for token, index in vocabulary.items()}
            for index in range(300, 320, 2):
                vocabulary[by_id[index]], vocabulary[by_id[index + 1]] = index + 1, index

        edited(copy / "tokenizer.json", swapped)

    examined = changed(tmp_path, family, swap)
    found = examined.fits[0].differences
    assert [difference.what for difference in found] == ["vocabulary"] * 6
    assert "15 more tokens" in found[-1].why
    assert all("the draft has" in difference.why for difference in found[:-1])
    assert {difference.what for difference in examined.differences} == {"vocabulary"}


def test_a_special_token_that_is_no_longer_one(tmp_path: Path, family: Path) -> None:
    def ordinary(contents: dict) -> None:  # type: ignore[type-arg]
        contents["added_tokens"][0]["special"] = False

    examined = changed(tmp_path, family, lambda copy: edited(copy / "tokenizer.json", ordinary))
    special = [d for d in examined.fits[0].differences if d.what == "special id"]
    assert [(d.name, d.why) for d in special] == [("'<|endoftext|>'", "none, and the draft has 0")]


def test_another_end_of_text(tmp_path: Path, family: Path) -> None:
    def longer(contents: dict) -> None:  # type: ignore[type-arg]
        contents["eos_token_id"] = [0, 1]

    examined = changed(tmp_path, family, lambda copy: edited(copy / "generation_config.json", longer))
    assert [str(difference) for difference in examined.differences] == ["end: [0, 1], was [0]"]
    assert "against the version in use" in examined.report()
    (tmp_path / "target-v1" / "generation_config.json").unlink()
    assert end_ids_of(tmp_path / "target-v1") == [0]


def test_fewer_logits_than_the_draft_has(tmp_path: Path, family: Path) -> None:
    def fewer(contents: dict) -> None:  # type: ignore[type-arg]
        contents["vocab_size"] = 8000

    examined = changed(tmp_path, family, lambda copy: edited(copy / "config.json", fewer))
    assert "logits: 8000, and the draft has 8192" in examined.report()


def test_a_draft_of_a_longer_layout_lacks_nothing_silently(tmp_path: Path, family: Path) -> None:
    """A target of fewer blocks has not the tensors that the draft shares, whatever the others are."""

    def shallow(contents: dict) -> None:  # type: ignore[type-arg]
        contents["num_hidden_layers"] = 7

    bundle = anchor_of_one_block(family, tmp_path)
    copy = shutil.copytree(family / "target-v1", tmp_path / "target-v1")
    edited(copy / "config.json", shallow)
    why = {difference.name: difference.why for difference in examine(copy, [bundle]).fits[0].differences}
    assert why["model.layers.7.mlp.up_proj.weight"] == "the version has no such tensor"
    assert why["model.layers.6.mlp.up_proj.weight"] == "the draft has no such tensor"


def test_what_cannot_be_read_is_said(tmp_path: Path, family: Path) -> None:
    with pytest.raises(TargetError, match="no target at"):
        examine(tmp_path / "nothing", [])
    with pytest.raises(TargetError, match=r"config\.json"):
        examine(tmp_path, [])
    bundle = shutil.copytree(family / "bundle", tmp_path / "bundle")
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(BundleCorrupt):
        examine(family / "target-v1", [bundle])
