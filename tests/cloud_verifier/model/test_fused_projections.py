"""Linear layers with one input, computed as one product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_verifier.model.fused_projections import ProjectionFusion
from cloud_verifier.model.layer_compilation import compile_layers
from cloud_verifier.model.quantization import Fp8Linear, Int8Linear, QuantizedLinear, quantize_layers
from cloud_verifier.model.target import load_model, share_equal_tensors
from tests.models import VOCABULARY_SIZE, save_target

IDS = torch.arange(20)[None] % VOCABULARY_SIZE


def fused_names(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules() if name.rpartition(".")[2].startswith("fused")}


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type, expected",
    [
        ("llama", {"fused_q_proj_k_proj_v_proj", "fused_gate_proj_up_proj"}),
        # Its projections are one layer in the checkpoint.
        ("phi3", set()),
        ("qwen2", {"fused_q_proj_k_proj_v_proj", "fused_gate_proj_up_proj"}),
        ("gemma2", {"fused_q_proj_k_proj_v_proj", "fused_gate_proj_up_proj"}),
        ("mixtral", {"fused_q_proj_k_proj_v_proj"}),
    ],
)
def test_layers_with_one_input_are_fused_and_compute_the_same(
    tmp_path: Path, model_type: str, expected: set[str]
) -> None:
    model = load_model(save_target(tmp_path / "model", model_type), "cpu", "float32")[0]
    before, structure = logits(model), [(name, type(module)) for name, module in model.named_modules()]
    fusion = ProjectionFusion(model)
    assert fused_names(model) >= expected
    assert bool(fused_names(model)) == bool(expected)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert fusion.undo() == bool(expected)
    assert not fusion.undo()
    assert [(name, type(module)) for name, module in model.named_modules()] == structure
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_the_tensors_of_a_layer_are_views_of_the_fused_ones(tiny_path: Path) -> None:
    model, plain = (load_model(tiny_path, "cpu", "float32")[0] for _ in range(2))
    ProjectionFusion(model)
    attention, before = model.model.layers[0].self_attn, plain.model.layers[0].self_attn
    whole = attention.fused_q_proj_k_proj_v_proj.whole
    for name in ("q_proj", "k_proj", "v_proj"):
        own, known = getattr(attention, name), getattr(before, name)
        assert isinstance(own, torch.nn.Linear)
        assert torch.equal(own.weight, known.weight)
        assert own.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()


def test_layers_may_be_called_in_any_order_with_any_input(tiny_path: Path) -> None:
    model = load_model(tiny_path, "cpu", "float32")[0]
    attention = model.model.layers[0].self_attn
    inputs = [torch.randn(1, 3, model.config.hidden_size) for _ in range(2)]
    with torch.inference_mode():
        expected = [[layer(each) for layer in (attention.q_proj, attention.v_proj)] for each in inputs]
        ProjectionFusion(model)
        for _ in range(2):
            for each, (query, value) in zip(inputs, expected, strict=True):
                torch.testing.assert_close(attention.v_proj(each), value)
                torch.testing.assert_close(attention.q_proj(each), query)
                torch.testing.assert_close(attention.q_proj(each), query)


@pytest.mark.parametrize("layer_class", [Int8Linear, Fp8Linear])
def test_quantized_layers_are_fused(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, layer_class: type[QuantizedLinear]
) -> None:
    # A CPU refuses fp8, which is slow there.
    monkeypatch.setattr("cloud_verifier.model.quantization.Int8Linear", layer_class)
    model = load_model(tiny_path, "cpu", "float32", "int8")[0]
    assert type(model.model.layers[0].mlp.up_proj) is layer_class
    before = logits(model)
    ProjectionFusion(model)
    assert fused_names(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="no list of decoder layers with linear layers"):
        quantize_layers(model, "int8")


def test_a_version_shares_fused_tensors_with_another(tiny_path: Path) -> None:
    models = [load_model(tiny_path, "cpu", "float32")[0] for _ in range(2)]
    for model in models:
        ProjectionFusion(model)
    share_equal_tensors(*models)
    pointers = [{value.untyped_storage().data_ptr() for value in model.parameters()} for model in models]
    assert pointers[0] == pointers[1]


@pytest.mark.slow
def test_fused_layers_compile_once(tmp_path: Path) -> None:
    path = save_target(tmp_path / "model", "llama", num_hidden_layers=4)
    expected, model = (load_model(path, "cpu", "float32")[0] for _ in range(2))
    ProjectionFusion(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        compile_layers(model, backend="aot_eager")
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
