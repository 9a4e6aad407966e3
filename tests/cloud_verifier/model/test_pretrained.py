"""Loading checkpoints: multimodal, quantized, and those that are refused in one sentence without running their code."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from cloud_verifier.model.cpu_layers import dense_weight
from cloud_verifier.model.pretrained import UNLIMITED_CONTEXT, load_pretrained, load_text_config, text_part
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import TargetError
from tests.cloud_verifier.model.architectures import save_architecture
from tests.models import CodeInPickle

Damage = Callable[[Path], object]


def load(path: Path) -> Target:
    return Target(path, device="cpu", dtype=torch.float32)


def change_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def remote_code(model_type: str) -> Damage:
    """Name code of the checkpoint, which leaves a file where it runs."""

    def damage(path: Path) -> None:
        change_config(
            path,
            model_type=model_type,
            auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
        )
        for name in ("configuration_own.py", "modeling_own.py"):
            (path / name).write_text(f"open({str(path / 'code ran')!r}, 'w')\n")

    return damage


def only_pickled_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": CodeInPickle(path / "code ran")}, path / "pytorch_model.bin")


def shard(path: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="50KB")
    return sorted(path.glob("model-*.safetensors"))


def another_tokenizer(path: Path) -> None:
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0")).save(str(path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: change_config(path, model_type=None), "names no model_type"),
        (lambda path: change_config(path, model_type="frobnicator"), "type 'frobnicator'.* needs a newer transformers"),
        (remote_code("frobnicator"), r"code of its own \(auto_map\), which is never run"),
        (lambda path: (path / "config.json").write_text("{"), "is not a model configuration"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "vit"}'), "vit model, which does not generate"),
        (lambda path: (path / "config.json").write_text('{"model_type": "t5"}'), "encoder-decoder model"),
        (only_pickled_weights, "only 'pytorch_model.bin', and pickled weights are never loaded"),
        (lambda path: shard(path)[1].unlink(), "lacks model-00002-of-"),
        (lambda path: (shard(path), (path / "model.safetensors.index.json").unlink()), "lacks .*index.json"),
        (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (another_tokenizer, "token ids up to 999, but the model has 300 logits"),
        (lambda path: (path / "model.safetensors").write_bytes(b"short"), "damaged or truncated"),
    ],
    ids=[
        "no type", "unknown type", "remote code", "broken config", "no config", "no language model", "encoder-decoder",
        "pickle", "missing shard", "no index", "no tokenizer", "another tokenizer", "truncated",
    ],
)  # fmt: skip
def test_a_bad_directory_is_refused_in_one_sentence(tmp_path: Path, damage: Damage, reason: str) -> None:
    path = save_architecture(tmp_path / "model", "llama")
    damage(path)
    with pytest.raises(TargetError, match=reason) as refusal:
        load(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message.replace(str(path), "")) < 250
    assert not (path / "code ran").exists()


def test_code_of_a_checkpoint_does_not_run_where_transformers_has_its_own(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", "llama")
    remote_code("llama")(path)
    assert type(load(path).runner.model).__module__.startswith("transformers.")
    assert not (path / "code ran").exists()


def test_an_adapter_with_only_pickled_weights_is_refused(tmp_path: Path) -> None:
    base = save_architecture(tmp_path / "base", "llama")
    path = tmp_path / "adapter"
    path.mkdir()
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"weight": CodeInPickle(path / "code ran")}, path / "adapter_model.bin")
    with pytest.raises(TargetError, match=r"no adapter_model\.safetensors"):
        load(path)
    assert not (path / "code ran").exists()


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, "autoawq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
    ids=["awq", "gptq", "4 bits", "8 bits", "compressed-tensors", "hqq"],
)
def test_the_package_that_a_quantized_checkpoint_needs_is_named(
    tmp_path: Path, settings: dict[str, Any], package: str
) -> None:
    if any(importlib.metadata.distributions(name=package)):
        pytest.skip(f"{package} is installed")
    path = save_architecture(tmp_path / "model", "llama")
    change_config(path, quantization_config=settings)
    with pytest.raises(TargetError, match=f"is quantized with .*, which needs the package {package}: pip install"):
        load(path)


@pytest.mark.parametrize(
    ("model_type", "text_class"),
    [
        ("gemma3", "Gemma3ForCausalLM"),
        ("mistral3", "MistralForCausalLM"),
        ("llama4", "Llama4ForCausalLM"),
        ("llava", "LlamaForCausalLM"),
        # The whole model lets the tokens of a prompt attend to later ones; its language model alone does not.
        ("paligemma", "PaliGemmaForConditionalGeneration"),
    ],
)
def test_the_text_part_of_a_multimodal_model(tmp_path: Path, model_type: str, text_class: str) -> None:
    path = save_architecture(tmp_path / "model", model_type)
    model = load_pretrained(path, "cpu", torch.float32)
    text = text_part(model)
    assert type(text).__name__ == text_class
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        whole = AutoModelForImageTextToText.from_pretrained(path)(input_ids=ids, attention_mask=torch.ones_like(ids))
        part = text(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(part.logits, whole.logits)
    has_vision = any("vision" in name for name, _ in text.named_modules())
    assert has_vision == (text_class == "PaliGemmaForConditionalGeneration")


def test_the_text_part_is_loaded_where_a_package_for_the_other_parts_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for Gemma 3n without timm: its tensors are named as transformers names them today."""
    path = save_architecture(tmp_path / "model", "mistral3")
    weights = load_file(path / "model.safetensors")
    renamed = {
        re.sub(r"^language_model\.(model\.)?", lambda found: "model.language_model." if found[1] else "", name): tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    expected = text_part(load_pretrained(path, "cpu", torch.float32)).state_dict()

    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("this model requires timm")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", fail)
    text = load(path).runner.model
    assert type(text).__name__ == "MistralForCausalLM"
    weights = {name: dense_weight(tensor) for name, tensor in text.state_dict().items()}
    torch.testing.assert_close(weights, dict(expected))


def test_a_recurrent_model_has_a_context_though_it_needs_none(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", "mamba")
    change_config(path, max_position_embeddings=None)
    assert load(path).context == UNLIMITED_CONTEXT


def test_the_text_configuration_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", "mistral3")
    assert load_text_config(path).model_type == "mistral"
    assert AutoConfig.from_pretrained(path).model_type == "mistral3"
