"""`cloud-verifier check`: what it says of any directory is what serving it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from cloud_verifier.cli.main import main
from cloud_verifier.model.inspection import Finding, inspect_target
from cloud_verifier.model.skeleton import build_skeleton
from cloud_verifier.model.target import Target
from tests.cloud_verifier.model.architectures import save_architecture
from tests.models import save_target


def inspect(path: Path, **options: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in inspect_target(path, **options)}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3", "mistral3", "llama4", "bloom", "gpt_oss", "mamba2", "lfm2"])
def test_what_is_said_is_what_serving_does(tmp_path: Path, model_type: str) -> None:
    path = save_architecture(tmp_path / "target", model_type)
    found = inspect(path)
    target = Target(path, device="cpu", dtype=torch.float32)
    assert not [finding for finding in found.values() if finding.state == "fault"]
    assert found["tier"].found.startswith("general" if target.general_tier_reason else "fast")
    assert found["cache"].figures["bytes_per_token"] == target.runner.shape.bytes_per_token
    assert found["context"].figures["context"] == target.context


@pytest.mark.slow
def test_a_large_model_is_cut_down_to_every_kind_of_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud_verifier.model.skeleton.LARGE_PARAMETERS", 0)
    kinds = ["full_attention"] * 11 + ["sliding_attention"]
    path = save_target(
        tmp_path / "target",
        "qwen3",
        num_hidden_layers=24,
        layer_types=kinds * 2,
        sliding_window=16,
        use_sliding_window=True,
    )
    skeleton = build_skeleton(path)
    assert skeleton.layers == len(skeleton.model.model.layers) == 12
    assert skeleton.model.config.layer_types == kinds
    # Keys and values of 2 heads of 16, in 24 layers.
    assert inspect(path)["cache"].figures["bytes_per_token"] == 24 * 2 * 2 * 16 * 4


def copy_of(source: Path, path: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, path)
    change(path)
    return path


def edit(file: str, **settings: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        contents = json.loads((path / file).read_text()) | settings
        (path / file).write_text(json.dumps(contents))

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer", "has no tokenizer.json"),
        (lambda path: (path / "model.safetensors").unlink(), "weights", "no safetensors weights"),
        (lambda path: (path / "config.json").unlink(), "configuration", "no config.json"),
        (edit("config.json", model_type="t5"), "configuration", "encoder-decoder"),
        (edit("config.json", quantization_config={"quant_method": "awq"}), "quantization", "needs the package autoawq"),
        (edit("config.json", vocab_size=200), "tokenizer", "200 logits"),
    ],
    ids=["tokenizer", "weights", "config", "encoder", "awq", "vocabulary"],
)
def test_faults_are_one_row_with_its_remedy(
    tiny_path: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    subject: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copy_of(tiny_path, tmp_path / "broken", change)
    finding = inspect(path)[subject]
    assert (finding.state, words in finding.found, bool(finding.advice)) == ("fault", True, True), finding
    assert main(["check", str(path), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["healthy"]


def test_the_template_and_the_tokens_that_end_a_text(tiny_path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    path = copy_of(tiny_path, tmp_path / "chat", tokenizer.save_pretrained)
    found = inspect(path)
    # A token for images, for example, needs no logit.
    assert (found["tokenizer"].state, "1 added tokens have no logit" in found["tokenizer"].found) == ("ok", True)
    assert "no end token" in found["chat template"].found
    assert "300" in found["chat template"].advice
    edit("generation_config.json", eos_token_id=[0, 300])(path)
    assert inspect(path)["chat template"].state == "ok"
    (path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "cannot be rendered" in inspect(path)["chat template"].found
    edit("generation_config.json", eos_token_id=None)(path)
    edit("config.json", eos_token_id=None)(path)
    edit("tokenizer_config.json", eos_token=None)(path)
    assert "every text has its full length" in inspect(path)["end of text"].found


@pytest.mark.slow
def test_the_command(family: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(family / "target-v2"), "--draft", str(family / "bundle"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    states = {finding["subject"]: finding["state"] for finding in record["findings"]}
    assert record["healthy"]
    assert states["adapter"] == states["bundle"] == "ok"
    assert main(["check", str(tiny_path), "--draft", str(family / "bundle")]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["check", str(tiny_path / "nothing")]) == 1
    assert "no target" in capsys.readouterr().out
