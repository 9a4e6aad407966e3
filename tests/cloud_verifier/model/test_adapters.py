"""PEFT adapters, alone and from a registry beside others: the text is that of peft beside its base, or a refusal."""

from __future__ import annotations

import asyncio
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target
from cloud_verifier.registry.adapter import is_plain_lora
from cloud_verifier.registry.compatibility import check_compatibility
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.engine.recording_target import running_scheduler
from tests.cloud_verifier.model.architectures import save_architecture
from tests.cloud_verifier.model.test_conformance import MARGIN, NEW_TOKENS, TargetText, assert_text_equal
from tests.cloud_verifier.target_versions import make_target
from tests.models import VOCABULARY_SIZE, save_target

SAMPLINGS = (Sampling(ignore_eos=True), Sampling(0.9, seed=5, ignore_eos=True))
ATTENTION = ["q_proj", "v_proj"]
# Adapters that run beside others on one base.
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": [*ATTENTION, "down_proj"]},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 4},
    "patterns": {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.q_proj": 32}},
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
}
# Adapters that are merged into a base of their own.
MERGED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "pissa": {"target_modules": ATTENTION, "init_lora_weights": "pissa"},
    "olora": {"target_modules": ATTENTION, "init_lora_weights": "olora"},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias": {"target_modules": ATTENTION, "lora_bias": True},
    "base's bias": {"target_modules": ATTENTION, "bias": "lora_only"},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": [3, 7]},
    "whole norm": {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
}


def save_adapter(base: Path, path: Path, seed: int = 1, **settings: Any) -> Path:
    """Save an adapter as after training: every tensor of it has been changed."""
    return save_peft(base, path, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | settings), seed)


def save_peft(base: Path, path: Path, config: Any, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(path, save_embedding_layers=False)
    return path


def peft_texts(base: Path, adapter: Path) -> list[TargetText]:
    """Texts of peft's own model, which keeps the adapter beside its base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return texts_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval())


def base_texts(base: Path) -> list[TargetText]:
    return texts_of(AutoModelForCausalLM.from_pretrained(base).eval())


def texts_of(model: Any) -> list[TargetText]:
    prompts = [[(7 * i * i + 11 * i + 3) % VOCABULARY_SIZE for i in range(length)] for length in (3, 40)]
    return [
        TargetText(prompt, sampling, generate_reference(model, prompt, sampling, NEW_TOKENS + MARGIN, frozenset({0})))
        for prompt, sampling in zip(prompts, SAMPLINGS, strict=True)
    ]


async def assert_texts_equal(target: Target, texts: list[TargetText], others: dict[Path, list[TargetText]]) -> None:
    """Compare texts of `target`, and of `others` that are loaded beside it, all decoded at the same time."""
    async with running_scheduler(target, window=0.0, target_factory=make_target) as scheduler:
        served = [(await scheduler.load(path, path.name), others[path]) for path in others]
        await asyncio.gather(
            *(
                assert_text_equal(scheduler, version, text, seed)
                for version, expected in [(target, texts), *served]
                for seed, text in enumerate(expected)
            )
        )
        shared = [version.name for version, _ in served if version.runner is target.runner]
        assert shared == [path.name for path in others if is_plain_lora(path)]


def load(path: Path, others: list[Target] | None = None) -> Target:
    return Target(path, device="cpu", dtype=torch.float32, share_with=others)


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "base"
    return save_target(path, tie_word_embeddings=request.param == "tied", attention_bias=True)


# Each with a tied head; with a head of its own those that change head or embedding, and one of each other kind.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "name"),
    [
        *(("tied", name) for name in PLAIN | MERGED),
        *(("untied", name) for name in ("plain", "head", "dora", "embedding", "tokens")),
    ],
    indirect=["base"],
)
async def test_the_text_is_that_of_peft_alone_and_beside_others(base: Path, tmp_path: Path, name: str) -> None:
    adapter = save_adapter(base, tmp_path / "tuned", **(PLAIN | MERGED)[name])
    other = save_adapter(base, tmp_path / "other", seed=2, **PLAIN["plain"])
    texts = peft_texts(base, adapter)
    await assert_texts_equal(load(adapter), texts, {})
    others = {other: peft_texts(base, other), adapter: texts}
    await assert_texts_equal(load(base, []), base_texts(base), others)
    assert is_plain_lora(adapter) == (name in PLAIN)


@pytest.mark.slow
async def test_adapters_that_are_not_lora(base: Path, tmp_path: Path) -> None:
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    for name, config in (("ia3", ia3), ("loha", LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=ATTENTION))):
        adapter = save_peft(base, tmp_path / name, config)
        await assert_texts_equal(load(adapter), peft_texts(base, adapter), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mixtral", {"target_modules": ["w1", "q_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("mamba", {"target_modules": ["in_proj", "x_proj"]}),
    ],
)
async def test_adapters_of_other_architectures(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    """Experts see some rows of a forward, GPT-2 has no linear layers, and the general tier has no adapters."""
    base = save_architecture(tmp_path / "base", model_type)
    adapter = save_adapter(base, tmp_path / "tuned", **settings)
    await assert_texts_equal(load(adapter), peft_texts(base, adapter), {})
    async with running_scheduler(load(base, []), window=0.0, target_factory=make_target) as scheduler:
        tuned = await scheduler.load(adapter, "tuned")
        for seed, text in enumerate(peft_texts(base, adapter)):
            await assert_text_equal(scheduler, tuned, text, seed)


def edit(adapter: Path, **settings: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "sets alora_invocation_tokens to"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "sets layer_replication to"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "next year's"}, "cannot be repeated exactly"),
        ({"use_something_new": True}, "sets use_something_new to True, which is not supported"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"peft_type": "PROMPT_TUNING"}, "of the type 'PROMPT_TUNING'"),
        ({"peft_type": None}, "of the type None"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_applied_exactly_are_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    adapter = edit(save_adapter(base, tmp_path / "tuned", target_modules=ATTENTION), **settings)
    for attempt in (lambda: load(adapter), lambda: load(adapter, []), lambda: check_compatibility(adapter, [])):
        with pytest.raises(TargetError, match="the adapter at") as caught:
            attempt()
        assert sentence in str(caught.value)


def test_an_adapter_that_peft_cannot_merge_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_peft(base, tmp_path / "t", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TargetError, match="of the type 'PROMPT_TUNING'"):
        load(adapter)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_an_adapter_whose_tensors_have_no_place_is_refused(base: Path, tmp_path: Path, shared: bool) -> None:
    adapter = save_adapter(base, tmp_path / "tuned", target_modules=ATTENTION)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = list(tensors)
    for change in (
        {name.replace("model.layers", "transformer.h"): tensor for name, tensor in tensors.items()},
        tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": tensors[names[0]].clone()},
        {name: tensors[name] for name in names[2:]},
    ):
        save_file(change, file)
        with pytest.raises(TargetError, match=r"the adapter at .*tuned (has tensors|lacks tensors|does not fit)"):
            load(adapter, [] if shared else None)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(TargetError, match="damaged or truncated"):
        load(adapter, [] if shared else None)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(TargetError, match=r"has no adapter_model\.safetensors"):
        load(adapter, [] if shared else None)


def test_a_base_is_found_in_the_local_cache_of_the_hub(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir()
    snapshot.symlink_to(tiny_path, target_is_directory=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter = save_adapter(tiny_path, tmp_path / "tuned", target_modules=ATTENTION)
    assert load(edit(adapter, base_model_name_or_path="someone/tiny")).base == tiny_path
    with pytest.raises(TargetError, match="not in the local cache of the hub"):
        load(edit(adapter, base_model_name_or_path="someone/else"))


def test_an_adapter_of_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    first = save_adapter(base, tmp_path / "first", target_modules=ATTENTION)
    second = edit(save_adapter(base, tmp_path / "second", target_modules=ATTENTION), base_model_name_or_path="../first")
    with pytest.raises(TargetError, match="which holds an adapter"):
        load(second)
    assert first.is_dir()
