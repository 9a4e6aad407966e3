"""The compatibility gate, on versions of the shipped family and on copies in which one thing differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloud_verifier.model.target import Target, load_model
from cloud_verifier.registry.checkpoint import MAX_ADDED_TOKENS, read_end_ids, shared_fingerprints, version_name
from cloud_verifier.registry.compatibility import CompatibilityReport, check_compatibility
from edge_runtime.protocol.bundle import SharedTensors, read_bundle, write_manifest
from edge_runtime.protocol.errors import BundleCorrupt, TargetError
from export.example_family.evolution import save_changes
from tests.cloud_verifier.target_versions import save_incompatible_version

Json: TypeAlias = dict[str, Any]


def test_all_versions_of_the_family_are_compatible(family: Path) -> None:
    kinds = {"target-v1": "checkpoint", "target-v2": "adapter", "target-v3": "adapter", "target-v4": "changes"}
    for name, kind in kinds.items():
        report = check_compatibility(family / name, [family / "bundle"], family / "target-v1")
        assert (report.compatible, report.kind, report.describe()) == (True, kind, "")
        identity = read_bundle(family / "bundle").manifest.shared.identity
        assert [(fit.draft, fit.identity) for fit in report.fits] == [(str(family / "bundle"), identity)]


def test_the_gate_agrees_with_the_check_at_session_opening(family: Path, tmp_path: Path, target_v1: Target) -> None:
    v5 = tmp_path / "target-v5"
    save_incompatible_version(family / "target-v1", v5, str(family / "target-v1"))
    identity = read_bundle(family / "bundle").manifest.shared.identity
    assert target_v1.expected_identity(identity) == identity
    assert check_compatibility(family / "target-v1", []).version == target_v1.version
    report = check_compatibility(v5, [family / "bundle"], family / "target-v1")
    loaded = Target(v5, device="cpu", dtype=torch.float32)
    assert not report.compatible
    assert loaded.expected_identity(identity) != identity
    assert loaded.version == report.version


def test_the_report_names_a_changed_shared_tensor(family: Path, tmp_path: Path) -> None:
    v5 = tmp_path / "target-v5"
    save_incompatible_version(family / "target-v1", v5, str(family / "target-v1"))
    (difference,) = check_compatibility(v5, [family / "bundle"]).fits[0].differences
    assert (difference.what, difference.name) == ("tensor", "model.norm.weight")
    assert "other values" in difference.why


def test_unshared_blocks_may_change_and_shared_tensors_may_not(family: Path, tmp_path: Path) -> None:
    shared = read_bundle(family / "bundle").manifest.shared.fingerprints
    model = load_model(family / "target-v1", "cpu", torch.float32)[0]
    names = [name for name, _ in model.named_parameters()]
    for name, fits in (("model.layers.2.mlp.up_proj.weight", True), (sorted(shared)[0], False)):
        assert name in names
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        save_changes(model, family / "target-v1", tmp_path / name, str(family / "target-v1"))
        report = check_compatibility(tmp_path / name, [family / "bundle"])
        assert (report.kind, report.compatible) == ("changes", fits)


def test_an_adapter_on_a_shared_module_does_not_fit(family: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(family / "target-v2", tmp_path / "target-v9")
    adapter = load_file(copy / "adapter_model.safetensors")
    moved = {name.replace(".layers.2.", ".layers.3."): value for name, value in adapter.items()}
    moved |= {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 192)}
    save_file(moved, copy / "adapter_model.safetensors")
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(family / "target-v1")
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    report = check_compatibility(copy, [bundle_sharing_last_block(family, tmp_path)])
    reasons = {difference.name: difference.why for difference in report.fits[0].differences}
    # The head is the embedding, which the adapter leaves as it is; but the draft has it as its head, too.
    assert reasons.keys() > {"model.layers.3.self_attn.q_proj.weight", "model.embed_tokens.weight"}
    assert set(reasons.values()) == {"an adapter changes it"}
    assert not any(".layers.1." in name or "layernorm" in name for name in reasons)


def bundle_sharing_last_block(family: Path, tmp_path: Path) -> Path:
    """A copy of the shipped bundle whose manifest claims that it shares the last block."""
    base, path = family / "target-v1", tmp_path / "one"
    fingerprints = shared_fingerprints(base, base, "anchor", 1, 4)
    shutil.copytree(family / "bundle", path)
    manifest = read_bundle(path, verify=False).manifest
    write_manifest(path, msgspec.structs.replace(manifest, shared=SharedTensors("anchor", 1, fingerprints)))
    return path


def check_edited(tmp_path: Path, family: Path, file: str, edit: Callable[[Json], None]) -> CompatibilityReport:
    """Run the gate on a copy of target v1, after `edit` has changed one of its JSON files."""
    copy = shutil.copytree(family / "target-v1", tmp_path / "target-v1")
    edit_json(copy / file, edit)
    return check_compatibility(copy, [family / "bundle"], family / "target-v1")


def edit_json(path: Path, edit: Callable[[Json], None]) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    edit(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")


def test_tokens_with_other_ids_are_named(tmp_path: Path, family: Path) -> None:
    def swap_ids(contents: Json) -> None:
        vocabulary = contents["model"]["vocab"]
        by_id = {index: token for token, index in vocabulary.items()}
        for index in range(300, 320, 2):
            vocabulary[by_id[index]], vocabulary[by_id[index + 1]] = index + 1, index

    report = check_edited(tmp_path, family, "tokenizer.json", swap_ids)
    differences = report.fits[0].differences
    assert [difference.what for difference in differences] == ["vocabulary"] * 6
    assert "15 more tokens" in differences[-1].why
    assert all("the draft has" in difference.why for difference in differences[:-1])
    assert {difference.what for difference in report.differences} == {"vocabulary"}


def test_a_special_token_that_became_ordinary(tmp_path: Path, family: Path) -> None:
    def make_ordinary(contents: Json) -> None:
        contents["added_tokens"][0]["special"] = False

    report = check_edited(tmp_path, family, "tokenizer.json", make_ordinary)
    special = [difference for difference in report.fits[0].differences if difference.what == "special id"]
    assert [(d.name, d.why) for d in special] == [("'<|endoftext|>'", "none, and the draft has 0")]


def test_other_end_of_text_ids(tmp_path: Path, family: Path) -> None:
    report = check_edited(
        tmp_path, family, "generation_config.json", lambda contents: contents.update(eos_token_id=[0, 1])
    )
    assert [str(difference) for difference in report.differences] == ["end: [0, 1], was [0]"]
    assert "compared with the version in use" in report.describe()
    (tmp_path / "target-v1" / "generation_config.json").unlink()
    assert read_end_ids(tmp_path / "target-v1") == [0]


def test_fewer_logits_than_the_draft_has(tmp_path: Path, family: Path) -> None:
    report = check_edited(tmp_path, family, "config.json", lambda contents: contents.update(vocab_size=2000))
    assert "logits: 2000, and the draft has 2048" in report.describe()


def test_a_target_with_fewer_blocks_lacks_shared_tensors(tmp_path: Path, family: Path) -> None:
    bundle = bundle_sharing_last_block(family, tmp_path)
    copy = shutil.copytree(family / "target-v1", tmp_path / "target-v1")
    edit_json(copy / "config.json", lambda contents: contents.update(num_hidden_layers=3))
    differences = check_compatibility(copy, [bundle]).fits[0].differences
    reasons = {difference.name: difference.why for difference in differences}
    assert reasons["model.layers.3.mlp.up_proj.weight"] == "the version has no such tensor"
    assert reasons["model.layers.2.mlp.up_proj.weight"] == "the draft has no such tensor"


def test_unreadable_versions_and_bundles_are_reported(tmp_path: Path, family: Path) -> None:
    with pytest.raises(TargetError, match="no target at"):
        check_compatibility(tmp_path / "nothing", [])
    with pytest.raises(TargetError, match=r"config\.json"):
        check_compatibility(tmp_path, [])
    bundle = shutil.copytree(family / "bundle", tmp_path / "bundle")
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(BundleCorrupt):
        check_compatibility(family / "target-v1", [bundle])


def save_shards(model: Any, path: Path, family: Path) -> Path:
    """Save `model` as several shards, with the files of target v1 that are no weights."""
    shutil.copytree(family / "target-v1", path, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(path, max_shard_size="2MB")
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1
    return path


def test_files_that_transformers_does_not_load_change_nothing(family: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family / "target-v1")
    good = save_shards(model, tmp_path / "good", family)
    version = check_compatibility(good, [family / "bundle"]).version
    # Shards of an older version, with another number of files.
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    changed = save_shards(model, tmp_path / "changed", family)
    for shard in changed.glob("model-*-of-*.safetensors"):
        shutil.copy(shard, good / shard.name.replace("-of-", "-of-9"))
    report = check_compatibility(good, [family / "bundle"])
    assert (report.compatible, report.version) == (True, version)
    for shard in (tmp_path / "good").glob("model-*-of-0*.safetensors"):
        shutil.copy(shard, changed / shard.name.replace("-of-", "-of-9"))
    assert not check_compatibility(changed, [family / "bundle"]).compatible
    # One file comes before an index.
    shutil.copy(family / "target-v1" / "model.safetensors", changed)
    assert check_compatibility(changed, [family / "bundle"]).compatible
    loaded = AutoModelForCausalLM.from_pretrained(changed)
    assert torch.equal(loaded.model.norm.weight * 2, model.model.norm.weight)


def test_shards_that_contradict_their_index_are_refused(family: Path, tmp_path: Path) -> None:
    sharded = save_shards(AutoModelForCausalLM.from_pretrained(family / "target-v1"), tmp_path / "target", family)
    first, second = sorted(sharded.glob("model-*-of-*.safetensors"))[:2]
    name, tensor = load_file(first).popitem()
    whole = load_file(second)
    save_file(whole | {name: tensor}, second)
    with pytest.raises(TargetError, match=f"both hold {name}"):
        check_compatibility(sharded, [])
    save_file(dict(list(whole.items())[1:]), second)
    with pytest.raises(TargetError, match="has no tensor"):
        check_compatibility(sharded, [])
    edit_json(sharded / "model.safetensors.index.json", lambda contents: contents["weight_map"].update(x="../x"))
    with pytest.raises(TargetError, match="not beside it"):
        check_compatibility(sharded, [])


@pytest.mark.slow
@pytest.mark.parametrize(("special", "count"), [(True, 2), (False, 1), (True, 20)])
def test_added_special_tokens_lock_out_no_draft(family: Path, tmp_path: Path, special: bool, count: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family / "target-v1")
    tokenizer.add_tokens([AddedToken(f"<|tool-{index}|>", special=special) for index in range(count)])
    model = AutoModelForCausalLM.from_pretrained(family / "target-v1")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    version = tmp_path / "target-v9"
    model.save_pretrained(version)
    tokenizer.save_pretrained(version)
    fits = special and count <= MAX_ADDED_TOKENS
    report = check_compatibility(version, [family / "bundle"], family / "target-v1")
    assert report.compatible == fits
    bundle = read_bundle(family / "bundle").manifest
    target = Target(version, device="cpu", dtype=torch.float32)
    assert (bundle.vocabulary.hash in target.draft_vocabularies) == fits
    assert (target.expected_identity(bundle.shared.identity) == bundle.shared.identity) == fits
    # A draft that shares a changed tensor still does not fit.
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(version)
    tensors = [d.name for d in check_compatibility(version, [family / "bundle"]).fits[0].differences if fits]
    assert tensors == ["model.norm.weight"] * fits


def test_a_snapshot_of_the_hubs_cache_goes_by_its_models_name(tmp_path: Path, family: Path) -> None:
    snapshot = tmp_path / "models--someone--writer" / "snapshots" / "0123456789abcdef"
    shutil.copytree(family / "target-v1", snapshot)
    assert check_compatibility(snapshot, []).version.startswith("writer@")
    assert Target(snapshot, device="cpu", dtype=torch.float32).name == "writer"
    assert version_name(snapshot.parent) == "snapshots"


def test_a_link_goes_by_its_own_name(tmp_path: Path, family: Path) -> None:
    """The example family links its first version to where the converted model is cached."""
    link = tmp_path / "writer-v1"
    link.symlink_to(family / "target-v1")
    assert check_compatibility(link, []).version.startswith("writer-v1@")
    target = Target(link, device="cpu", dtype=torch.float32)
    assert target.version == Target(family / "target-v1", device="cpu", name="writer-v1", dtype=torch.float32).version
