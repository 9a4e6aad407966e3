"""Quantized graphs: the same bytes as onnxruntime's own quantizer, on both kinds of graph, and close to float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as theirs

from edge_runtime.draft import make_runner
from edge_runtime.protocol.bundle import Architecture
from export.bundle import quantize
from export.bundle.build import BundleConfig, make_bundle
from export.bundle.four_bits import round_to_4_bits
from export.bundle.onnx_graph import GRAPH_FILE, GRAPH_KINDS, WEIGHT_TYPES, export_graph
from export.bundle.quantize import (
    BLOCK_SIZE,
    EMBEDDING,
    QUANTIZATION_SCHEMES,
    QuantizationScheme,
    quantize_blocks,
    quantize_model,
    store_half_precision,
)
from tests.models import make_target, save_target

ROWS, WIDTH = 300, 96
TEXT = "for index in range(10):\n    print(index)\n" * 3


@pytest.fixture
def model() -> onnx.ModelProto:
    """Embedding and head: ids (b, s) to logits (b, s, ROWS)."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    head = rng.standard_normal((WIDTH, ROWS)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", [EMBEDDING, "ids"], ["hidden"], name="/model/embed_tokens/Gather"),
            helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="/lm_head/MatMul"),
        ],
        "graph",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", ROWS]),
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", "s", WIDTH]),
        ],
        [numpy_helper.from_array(table, EMBEDDING), numpy_helper.from_array(head, "head")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def stored_in_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """The values that a graph with int8 weights multiplies by."""
    blocks = quantize_blocks(weight.numpy(), 8, False)
    levels = blocks.packed.reshape(len(weight), -1, BLOCK_SIZE).astype(np.float32) - 128
    return torch.from_numpy(levels * blocks.scales[..., None]).flatten(1)[:, : weight.shape[1]]


def run(model: ir.Model, path: Path) -> list[np.ndarray]:
    ir.save(model, path)
    return ort.InferenceSession(str(path)).run(["logits", "hidden"], {"ids": np.arange(ROWS)[None]})


@pytest.mark.parametrize("k_quant", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizes_as_onnxruntime_does(model: onnx.ModelProto, bits: int, k_quant: bool) -> None:
    """64 inputs: with an odd number of blocks onnxruntime's 4-bit zero points do not fit its own operator."""
    weight = np.random.default_rng(1).standard_normal((64, ROWS)).astype(np.float32)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "head"))
    kind = theirs.KQuantWeightOnlyQuantConfig if k_quant else theirs.RTNWeightOnlyQuantConfig
    config = kind(customized_weight_config={"/lm_head/MatMul": {"bits": bits}})
    quantizer = theirs.MatMulNBitsQuantizer(
        model, block_size=32, is_symmetric=not k_quant, accuracy_level=4, algo_config=config
    )
    quantizer.process()
    expected = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in quantizer.model.model.graph.initializer
        if tensor.name != EMBEDDING
    }
    blocks = quantize_blocks(weight.T, bits, k_quant)
    assert np.array_equal(blocks.packed, expected[f"head_Q{bits}G32"])
    # Ours are stored in float16.
    np.testing.assert_allclose(blocks.scales, expected["head_scale"], rtol=2**-11)
    assert (blocks.zeros is not None) is k_quant
    if blocks.zeros is not None:
        assert np.array_equal(blocks.zeros, expected["head_zp"].reshape(blocks.zeros.shape))


@pytest.mark.parametrize("k_quant", [False, True])
def test_quantizing_in_parts_gives_the_same_blocks(k_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((37, 80)).astype(np.float32)
    whole = quantize_blocks(weight, 4, k_quant)
    monkeypatch.setattr(quantize, "MAX_WEIGHTS_AT_ONCE", 5 * 96)
    pieces = quantize_blocks(weight, 4, k_quant)
    assert np.array_equal(whole.packed, pieces.packed)
    assert np.array_equal(whole.scales, pieces.scales)
    assert k_quant == (whole.zeros is not None and np.array_equal(whole.zeros, pieces.zeros))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(8, 8),
        QuantizationScheme(8, 8, k_quant=True),
        QuantizationScheme(4, 4),
        QuantizationScheme(4, 4, k_quant=True),
    ],
)
def test_quantized_head_and_embedding_are_close_to_float(
    model: onnx.ModelProto, scheme: QuantizationScheme, tied: bool, tmp_path: Path
) -> None:
    """Three blocks a row: an odd number, so the last byte of zero points is half used."""
    table = numpy_helper.to_array(model.graph.initializer[0])
    if tied:
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(table.T), "head"))
    head = numpy_helper.to_array(model.graph.initializer[1])
    small = ir.from_proto(model)
    quantize_model(small, scheme, 1, tied=tied)
    logits, hidden = run(small, tmp_path / "small.onnx")
    # Half a step of rounding, plus half a step of the zero point with k-quant.
    step = 2 * np.abs(table).max() / 2**scheme.bits
    assert np.abs(hidden[0] - table).max() < step * 1.3
    assert np.abs(logits[0] - hidden[0] @ head).mean() < step * WIDTH**0.5
    tables = [name for name in small.graph.initializers if "G32" in name]
    assert len(tables) == (1 if tied else 2)


@pytest.mark.parametrize(("weights", "tied"), [("int8-head4", True), ("int8-head4", False), ("int4-fitted", True)])
def test_a_graph_computes_with_exactly_the_rounded_weights(weights: str, tied: bool, tmp_path: Path) -> None:
    """The values that a draft is trained with are those of its bundle. In float arithmetic, which boards do not use.

    Three blocks a row: an odd number, so the last byte of zero points is half used.
    """
    draft = make_target(
        "llama", hidden_size=192, head_dim=16, vocab_size=ROWS, num_hidden_layers=2, tie_word_embeddings=tied
    )
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    export_graph(draft, tmp_path, "fused", weights, context=64)
    graph = onnx.load(tmp_path / GRAPH_FILE)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(graph, tmp_path / GRAPH_FILE)
    architecture = Architecture(
        model_type="llama", hidden_size=192, layers=2, kv_heads=2, head_dim=16, vocabulary_size=ROWS, context=64
    )
    exported = make_runner(ort.InferenceSession(tmp_path / GRAPH_FILE), architecture)
    logits = np.stack([exported.append([token]).copy() for token in ids])
    with torch.no_grad():
        for module in draft.model.layers.modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            if weights == "int4-fitted":
                module.weight.copy_(round_to_4_bits(module.weight))
            else:
                blocks = quantize_blocks(module.weight.numpy(), 8, False)
                values = (blocks.packed.astype(np.float32) - 128) * blocks.scales[..., None]
                module.weight.copy_(torch.from_numpy(values).flatten(1)[:, : module.in_features])
        for weight in {draft.lm_head.weight, draft.model.embed_tokens.weight}:
            weight.copy_(round_to_4_bits(weight))
        expected = draft(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_float_head_leaves_the_embedding_float(model: onnx.ModelProto, tmp_path: Path) -> None:
    small = ir.from_proto(model)
    quantize_model(small, QUANTIZATION_SCHEMES["int4-head32"], 1, tied=True)
    logits, hidden = run(small, tmp_path / "small.onnx")
    table, head = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert np.array_equal(hidden[0], table)
    assert np.allclose(logits[0], table @ head, atol=1e-4)


def test_half_precision_halves_the_file_and_is_close(model: onnx.ModelProto, tmp_path: Path) -> None:
    small = ir.from_proto(model)
    store_half_precision(small)
    logits, hidden = run(small, tmp_path / "small.onnx")
    table, head = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert np.array_equal(hidden[0], table.astype(np.float16).astype(np.float32))
    assert np.abs(logits[0] - table @ head).max() < 0.05
    assert (tmp_path / "small.onnx").stat().st_size < 0.52 * (table.nbytes + head.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRAPH_KINDS)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_every_weight_type_of_both_graphs(weights: str, kind: str, tmp_path: Path) -> None:
    """Fewer bits give fewer bytes, and a graph that agrees with PyTorch far more than by chance."""
    target = save_target(
        tmp_path / "target", hidden_size=128, intermediate_size=256, tie_word_embeddings=kind == "fused"
    )
    manifest = make_bundle(BundleConfig(target, target, kind, weights, TEXT), tmp_path / "bundle", lambda _: None)
    table, blocks = 300 * 128, 2 * (2 * 128 * 64 + 2 * 128 * 32 + 3 * 128 * 256)
    # Each block of 32 weights has a scale of 16 bits, and with k-quant a zero point.
    bits = {
        "fp32": 32,
        "fp16": 16,
        "int8": 8.5,
        "int8-head4": 8.5,
        "int4-fitted": 4.4,
        "mixed": 8.75,
        "int4-k": 4.75,
    }.get(weights, 4.5)
    head_bits = {"int4-head8": 8.5, "int4-head32": 32, "int8-head4": 4.4}.get(weights, bits)
    # Rotary tables of the fused graph, and norms and constants of both.
    spare = 2 * 4 * 512 * 8 + 20_000
    assert manifest.files["model.onnx.data"].bytes < (2 * table * head_bits + blocks * bits) / 8 + spare
    assert manifest.parity.greedy_agreement > (0.15 if weights.startswith("int4") else 0.35)
