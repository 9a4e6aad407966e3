"""Packed weights and fused decoder layers, compared with the layers of transformers that they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.cpu_layers import MIN_ROWS, CpuLayers, FusedDecoderLayer, PackedLinear, packs_weights
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.target import make_runner
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.sampling import Sampling

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
CONTEXT = 128
needs_packing = pytest.mark.skipif(not packs_weights(torch.float32), reason="this CPU has neither AVX2 nor AVX-512")


def make_model(config_class: Any = LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(config_class(**SIZES, **options)).eval()
    for name, parameter in model.named_parameters():
        # Norms with weights other than one, biases other than zero, and logits that differ.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def fused_layers(model: Any) -> int:
    return sum(isinstance(vars(module).get("forward"), FusedDecoderLayer) for module in model.modules())


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_packed_layer_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    if not packs_weights(dtype):
        pytest.skip(f"this CPU has no instructions for {dtype}")
    torch.manual_seed(0)
    with torch.inference_mode():
        for outputs, inputs in ((576, 576), (192, 576), (576, 1536), (4099, 576), (80, 48)):
            linear = torch.nn.Linear(inputs, outputs, dtype=dtype)
            expected = torch.nn.functional.linear(rows := torch.randn(64, inputs).to(dtype), linear.weight, linear.bias)
            PackedLinear.pack(linear)
            together = linear(rows)
            torch.testing.assert_close(together, expected)
            if dtype != torch.float32:
                # Some processors compute few rows in another way; a text in bfloat16 is promised with `--exact` only.
                continue
            for count in (MIN_ROWS, 5, 6, 7, 8, 17, 33):
                assert torch.equal(linear(rows[:count].contiguous()), together[:count])
                assert torch.equal(linear(rows[-count:].contiguous()), together[-count:])


@needs_packing
def test_unpacked_layers_are_as_they_were() -> None:
    model = make_model(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = CpuLayers(model)
    layers.prepare(lambda _: None)
    assert type(model.lm_head) is PackedLinear
    assert fused_layers(model) == SIZES["num_hidden_layers"]
    layers.restore()
    assert fused_layers(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@needs_packing
@pytest.mark.parametrize(
    ("config", "options", "fused"),
    [
        (LlamaConfig, {}, 3),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 3),
        (MistralConfig, {"sliding_window": 7}, 3),
        (Qwen2Config, {}, 3),
        (Qwen3Config, {}, 3),
        # Its layers have the same parts, and scale what they add.
        (GraniteConfig, {"residual_multiplier": 0.3, "attention_multiplier": 0.3}, 0),
        # Another activation.
        (LlamaConfig, {"hidden_act": "gelu"}, 0),
    ],
)
def test_layers_are_fused_where_that_computes_the_same(config: Any, options: dict[str, Any], fused: int) -> None:
    model = make_model(config, **options)
    ids = [(7 * i) % 97 for i in range(24)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    runner = make_runner(model, CONTEXT, tested=True)
    assert fused_layers(model) == fused
    pool = KVCachePool(runner.shape, CONTEXT)
    sequence, logits = CachedSequence(), []
    for start, stop in ((0, 1), (1, 3), (3, 16), (16, 17), (17, 24)):
        segment = Segment.from_tokens(sequence, ids[start:stop], sampling=Sampling())
        logits.append(runner.logits(pool, [segment])[0])
        pool.keep(sequence, list(range(stop - start)))
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


@needs_packing
@pytest.mark.parametrize(("failures", "packed", "rows"), [(1, True, MIN_ROWS), (2, False, 1)])
def test_layers_are_prepared_as_far_as_the_test_passes(failures: int, packed: bool, rows: int) -> None:
    model = make_model()
    tried = []

    def test(min_rows: int) -> None:
        tried.append(min_rows)
        if len(tried) <= failures:
            raise ValueError("other logits")

    CpuLayers(model).prepare(test)
    assert fused_layers(model) == 0
    assert isinstance(model.lm_head, PackedLinear) == packed
    assert tried[-1] == rows


@needs_packing
def test_a_model_that_reads_a_weight_itself_keeps_it() -> None:
    model = make_model()
    head = model.lm_head

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.inner.weight.T

    model.lm_head = Head()
    runner = make_runner(model, CONTEXT, tested=True)
    assert runner.min_rows == 1
    assert type(head) is torch.nn.Linear


@needs_packing
def test_logits_of_a_round_do_not_depend_on_its_company_by_more_than_rounding() -> None:
    model = make_model()
    runner = make_runner(model, CONTEXT, tested=True)
    pool = KVCachePool(runner.shape, 4 * CONTEXT)
    sequences = [CachedSequence() for _ in range(3)]
    for number, sequence in enumerate(sequences):
        prompt = [(5 * i + number) % 97 for i in range(9 + number)]
        runner.run(pool, [Segment.from_tokens(sequence, prompt)])
        pool.keep(sequence, list(range(len(prompt))))

    def round_of(number: int, draft: list[int], siblings: dict[int, list[int]]) -> Segment:
        sequence = sequences[number]
        return Segment.from_tree(sequence, TokenTree(11, sequence.length + 1, draft, siblings), Sampling())

    rounds = [round_of(0, [], {}), round_of(1, [4, 5, 6], {1: [9]}), round_of(2, [8] * 7, {})]
    together = [logits.clone() for logits in runner.logits(pool, rounds)]
    for each, expected in zip(rounds, together, strict=True):
        [alone] = runner.logits(pool, [each])
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
