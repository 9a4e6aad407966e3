"""The doctor: findings on healthy targets of every architecture, and on every kind of fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from cloud_verifier.draft_models.layouts import LAYOUTS, SUPPORTED_MODEL_TYPES, build_draft, draft_config, plan_draft
from cloud_verifier.model.inspection import Finding
from device_profiles.comparison import DraftCost, DraftSize
from edge_runtime.planning.board_profile import cache_bytes, find_profile, shipped_profiles, weight_bytes
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import InputError
from export.bundle.build import BundleConfig, make_bundle
from export.cli.main import main
from export.evaluate.doctor import DraftQuery, diagnose
from export.evaluate.estimates import estimate_size
from tests.cloud_verifier.model.architectures import save_architecture
from tests.models import make_target, save_target

Rewrite = Callable[..., Path]


def findings_by_subject(target: Path, **settings: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(DraftQuery(target, **settings))}


def faults(target: Path, **settings: Any) -> dict[str, Finding]:
    found = findings_by_subject(target, **settings).items()
    assert all(finding.advice for _, finding in found if finding.state != "ok")
    return {subject: finding for subject, finding in found if finding.state == "fault"}


@pytest.fixture
def modify_target(tiny_path: Path, tmp_path: Path) -> Rewrite:
    """Copies the tiny target with another configuration; settings that are None are removed."""

    def make(**settings: Any) -> Path:
        copy = tmp_path / "modified"
        copy.mkdir()
        for file in tiny_path.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        config = json.loads((copy / "config.json").read_text()) | settings
        (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return copy

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_every_architecture_is_healthy(tmp_path: Path, model_type: str, tied: bool, layout: str) -> None:
    # Mistral's default window of 4096 tokens, for example, is served.
    target = save_target(tmp_path / "t", model_type, num_hidden_layers=4, tie_word_embeddings=tied)
    shared = 1 if layout == "prefix" else 0
    found = findings_by_subject(target, layout=layout, shared_blocks=shared, profiles=tuple(shipped_profiles()))
    # Byte-level test models have no chat template.
    assert {subject for subject, finding in found.items() if finding.state != "ok"} == {"chat template"}, found
    assert found["head"].found.startswith("tied" if tied else "untied")
    assert {f"speed, {profile.name}" for profile in shipped_profiles()} <= found.keys()
    size = found["size on disk"].figures
    assert ("embedding and head" in size) == tied and ("head" in size) != tied
    assert found["memory on the board"].figures["memory_bytes"] > size["weight_bytes"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_the_estimate_matches_the_built_draft(model_type: str, layout: str) -> None:
    target = make_target(model_type)
    draft, plan = build_draft(target, layout)
    expected = estimate_size(draft_config(target.config, plan))
    assert expected.parameters == sum(parameter.numel() for parameter in draft.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("qwen3", False)])
def test_the_estimate_matches_the_bundle(tmp_path: Path, model_type: str, tied: bool, weights: str) -> None:
    target = save_target(
        tmp_path / "t", model_type, hidden_size=128, intermediate_size=512, vocab_size=2048, tie_word_embeddings=tied
    )
    config = BundleConfig(target, target, "fused", weights, "x = 1\n" * 9, positions=20)
    manifest = make_bundle(config, tmp_path / "bundle", lambda step: None)
    expected = estimate_size(draft_config(*_whole(target)), weights)
    graph = manifest.files["model.onnx"].bytes
    assert weight_bytes(manifest) - graph == pytest.approx(expected.weight_bytes, rel=0.02)


def _whole(target: Path) -> tuple[PretrainedConfig, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target)
    return config, plan_draft(config, "standalone", new_blocks=config.num_hidden_layers)


def test_the_shipped_family(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", str(family / "target-v2"), "--bundle", str(family / "bundle"), "--json"]
    assert main([*arguments, "--new-blocks", "2", "--shared-blocks", "0"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["healthy"]
    found = {finding["subject"]: finding for finding in record["findings"]}
    bundle = read_bundle(family / "bundle").manifest
    stored = weight_bytes(bundle) - bundle.files["model.onnx"].bytes
    assert found["size on disk"]["figures"]["weight_bytes"] == pytest.approx(stored, rel=0.01)
    # The figure of `device-profile compare` for the bundle itself, whose graph is not among the estimated weights.
    cost = DraftCost.estimate(find_profile("raspberry-pi-5"), DraftSize("", stored, cache_bytes(bundle)), 0)
    assert found["speed, raspberry-pi-5"]["figures"]["milliseconds"] == pytest.approx(
        cost.milliseconds_per_token, rel=0.01
    )


@pytest.mark.parametrize(
    ("settings", "subject", "words"),
    [
        ({"model_type": "nobody-knows"}, "configuration", "nobody-knows"),
        ({"model_type": None}, "configuration", "names no model_type"),
        ({"model_type": "t5"}, "configuration", "encoder-decoder"),
        ({"tie_word_embeddings": False}, None, ""),
        ({"vocab_size": 200}, "tokenizer", "token ids up to 299, but the model has 200 logits"),
    ],
)
def test_faults_of_a_configuration(modify_target: Rewrite, settings: dict, subject: str | None, words: str) -> None:
    found = faults(modify_target(**settings))
    if subject is None:
        assert not found
    else:
        assert words in found[subject].found


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granite", "gemma3", "mistral3", "llama4", "bloom", "mamba"])
def test_targets_that_only_drafts_of_another_type_fit(tmp_path: Path, model_type: str) -> None:
    found = findings_by_subject(save_architecture(tmp_path / "target", model_type))
    assert not [finding for finding in found.values() if finding.state == "fault"], found
    assert f"drafts of {model_type} cannot be made" in found["draft's architecture"].found
    assert found["tier"].found.startswith("general" if model_type in ("mamba", "bloom") else "fast")


@pytest.mark.slow
def test_incomplete_checkpoints_are_faults(modify_target: Rewrite) -> None:
    target = modify_target()
    (target / "tokenizer.json").unlink()
    assert "no tokenizer.json" in faults(target)["tokenizer"].found
    (target / "tokenizer.json").write_text("{")
    assert "is not a tokenizer" in faults(target)["tokenizer"].found
    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert "damaged" in faults(target)["weights"].found
    weights.unlink()
    assert "has no safetensors weights" in faults(target)["weights"].found
    index = {"weight_map": {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "absent.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "model-1.safetensors").write_bytes(whole)
    assert "absent.safetensors" in faults(target)["weights"].found
    (target / "config.json").unlink()
    assert faults(target).keys() == {"configuration"}


def test_an_untied_head_that_is_not_stored(tmp_path: Path) -> None:
    target = save_target(tmp_path / "t", tie_word_embeddings=True)
    config = json.loads((target / "config.json").read_text()) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config))
    assert "no lm_head.weight" in faults(target)["head"].found


@pytest.mark.slow
def test_a_bundle_with_another_tokenizer(tiny_path: Path, family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "logits: 300, and the draft has 2048"
        in faults(tiny_path, new_blocks=1, bundle=family / "bundle")["bundle"].found
    )
    assert main(["doctor", str(tiny_path), "--new-blocks", "1", "--bundle", str(family / "bundle")]) == 3
    assert "fault" in capsys.readouterr().out


@pytest.mark.slow
def test_impossible_drafts(tiny_path: Path) -> None:
    assert "shares 0 to 1" in faults(tiny_path, shared_blocks=2)["layout"].found
    assert "choose one of anchor" in faults(tiny_path, layout="sideways")["layout"].found
    assert "600 tokens" in faults(tiny_path, context=600)["draft's context"].found


@pytest.mark.slow
def test_a_board_that_is_too_slow_is_a_warning(tmp_path: Path) -> None:
    """The size of a 7B model, in wide feed-forward blocks, which the check of the tier cuts; no weights are needed."""
    target = save_target(tmp_path / "t")
    shape = {"hidden_size": 2048, "intermediate_size": 32768, "num_hidden_layers": 32, "vocab_size": 32000}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "tie_word_embeddings": False}
    config = json.loads((target / "config.json").read_text()) | shape | {"max_position_embeddings": 4096}
    (target / "config.json").write_text(json.dumps(config))
    profiles = tuple(shipped_profiles())
    found = findings_by_subject(target, weights="int4", profiles=profiles)
    size = found["size on disk"].figures
    # Three blocks, head and embedding, at 9/16 of a byte each.
    assert size["weight_bytes"] == pytest.approx(0.5625 * (3 * 218.1e6 + 2 * 65.5e6), rel=0.01)
    assert found["speed, raspberry-pi-zero-2w"].state == "warning"
    assert found["speed, server"].state == "ok"


@pytest.mark.parametrize(
    "arguments", [["absent"], [".", "--profile", "toaster"], [".", "--context", "0"], [".", "--bundle", "absent"]]
)
def test_bad_input(tiny_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place, *options = arguments
    target = tiny_path if place == "." else tiny_path / place
    assert main(["doctor", str(target), *options]) == (3 if "--bundle" in options else InputError.exit_code)
    # Libraries may have logged before.
    assert capsys.readouterr().err.splitlines()[-1].startswith("draft-export: ")
