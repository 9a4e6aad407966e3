"""Quantizes the weights of an ONNX graph, and trims its head.

It works on onnxruntime-genai's graph and on optimum's: both name a block's projections the same way and multiply by
constants. Only one weight at a time is in memory as float, and the rounding's float64 copies cover only a part of it,
so a draft of an 8B target is quantized in little more memory than its float32 tensors take.

The rounding is onnxruntime's own (`neural_compressor`, ported from Intel's), except for the 4-bit matrices of the
weight types `int8-head4` and `int4-fitted` (see `export.bundle.four_bits`). The layout is that of its MatMulNBits and
GatherBlockQuantized operators: blocks of 32 or 64 along the inputs, each with a scale. Scales are stored as float16 and
widened when the graph is loaded, which saves 6 % of an 8-bit file. All graphs use `accuracy_level=4` (int8 arithmetic),
without which 8-bit MatMulNBits is 15 times slower. The embedding gets the head's bits, and shares its bytes if the
model ties them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir import convenience

from export.bundle.four_bits import GROUP_SIZE, quantize_to_4_bits, round_scales, scale_unit

BLOCK_SIZE = 32
ACCURACY_LEVEL = 4
DOMAIN = "com.microsoft"
LOGITS = "logits"
EMBEDDING = "model.embed_tokens.weight"
# Weights that are rounded at once: the rounding holds some five float64 copies of them. Chosen: 670 MB.
MAX_WEIGHTS_AT_ONCE = 1 << 24
# Smaller tensors stay float32: norms and biases take little space and are sensitive.
MIN_HALF_PRECISION_SIZE = 4096

Packed = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QuantizationScheme:
    """How the weights of a graph are stored.

    Attributes:
        bits: bits of every projection, 4 or 8.
        head_bits: bits of head and embedding; 32 leaves them float.
        k_quant: use llama.cpp's search for scales and zero points, not rounding to nearest with symmetric scales.
        sensitive: store the projections that llama.cpp's mixed types spare in 8 bits.
        fitted: round what has 4 bits by `export.bundle.four_bits`, as in training.
    """

    bits: int
    head_bits: int
    k_quant: bool = False
    sensitive: bool = False
    fitted: bool = False

    def quantize(self, weight: Weights, bits: int) -> QuantizedBlocks:
        """Quantize a matrix (rows, columns)."""
        if not (self.fitted and bits == 4):
            return quantize_blocks(weight, bits, self.k_quant)
        matrix = quantize_to_4_bits(torch.from_numpy(np.array(weight, np.float32)))
        rows = len(matrix.levels)
        return QuantizedBlocks(
            bits=bits,
            columns=matrix.columns,
            packed=_pack(matrix.levels.flatten(1).numpy(), 4).reshape(rows, -1, GROUP_SIZE // 2),
            scales=matrix.scales.numpy(),
            zeros=_pack(matrix.zero_points.numpy(), 4),
            block_size=GROUP_SIZE,
        )

    def projection_bits(self, node: str, layers: int) -> int:
        """Bits of the projection in the MatMul `node` of a model with `layers` layers."""
        if not self.sensitive or not node.endswith(("qkv_proj/MatMul", "v_proj/MatMul", "down_proj/MatMul")):
            return self.bits
        layer = int(node.split("/model/layers.")[1].split("/")[0])
        # The layers of onnxruntime-genai's `k_quant_mixed`: the first and last eighth, and every third in between.
        spared = layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2
        return 8 if spared else self.bits


QUANTIZATION_SCHEMES: Mapping[str, QuantizationScheme] = {
    "int8": QuantizationScheme(8, 8),
    "int8-head4": QuantizationScheme(8, 4, fitted=True),
    "int4-fitted": QuantizationScheme(4, 4, fitted=True),
    "mixed": QuantizationScheme(4, 8, k_quant=True, sensitive=True),
    "int4-head8": QuantizationScheme(4, 8),
    "int4-head32": QuantizationScheme(4, 32),
    "int4-k": QuantizationScheme(4, 4, k_quant=True),
    "int4": QuantizationScheme(4, 4),
}


@dataclass(frozen=True)
class QuantizedBlocks:
    """A quantized weight of `rows` outputs and `columns` inputs, in blocks along the inputs.

    Attributes:
        packed: (rows, blocks, block_size * bits / 8) uint8.
        scales: (rows, blocks) float32, rounded by `round_scales`.
        zeros: zero points, (rows, bytes) uint8, packed like the weights; None if they are all 2^(bits-1).
    """

    bits: int
    columns: int
    packed: Packed
    scales: Weights
    zeros: Packed | None
    block_size: int = BLOCK_SIZE


def quantize_blocks(weight: Weights, bits: int, k_quant: bool) -> QuantizedBlocks:
    """Quantize `weight` (rows, columns); an incomplete last block is padded with zeros."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK_SIZE)
    packed = np.empty((rows, blocks, BLOCK_SIZE * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, -(-blocks * bits // 8)), np.uint8) if k_quant else None
    step = max(1, MAX_WEIGHTS_AT_ONCE // (blocks * BLOCK_SIZE))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        padded = np.pad(weight[part], ((0, 0), (0, blocks * BLOCK_SIZE - columns)))
        values, scale, zero = _round(padded, bits, k_quant)
        packed[part] = _pack(values.reshape(len(padded), -1).astype(np.uint8), bits).reshape(len(padded), blocks, -1)
        scales[part] = scale.reshape(-1, blocks)
        if zeros is not None:
            zeros[part] = _pack(zero.reshape(-1, blocks).astype(np.uint8), bits)
    return QuantizedBlocks(bits, columns, packed, round_scales(torch.from_numpy(scales)).numpy(), zeros)


def quantize_model(model: ir.Model, scheme: QuantizationScheme, layers: int, *, tied: bool) -> None:
    """Quantize the projections, the head and the embedding of `model`, in place.

    Args:
        layers: number of layers of the model.
        tied: the embedding is the head's weight.
    """
    head = find_head(model)
    head_blocks: QuantizedBlocks | None = None
    for node in list(model.graph):
        if not _is_weight_matmul(node):
            continue
        bits = scheme.head_bits if node is head else scheme.projection_bits(str(node.name), layers)
        if bits == 32:
            continue
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        blocks = scheme.quantize(weight.const_value.numpy().T, bits)
        _replace_node(model, node, _quantized_matmul(model, node, str(weight.name), blocks))
        _remove_unused(model, weight)
        if node is head:
            head_blocks = blocks
    if scheme.head_bits != 32:
        _quantize_embedding(model, scheme, head_blocks if tied else None)


def store_half_precision(model: ir.Model) -> None:
    """Store large float32 tensors as float16, in place; onnxruntime converts them back when it loads the graph."""
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_HALF_PRECISION_SIZE:
            continue
        half = _add_initializer(model, f"{name}_fp16", tensor.numpy().astype(np.float16))
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_widened")
        for user, index in list(value.uses()):
            user.replace_input_with(index, cast.outputs[0])
        model.graph.insert_before(next(iter(model.graph)), cast)
        cast.outputs[0].name = f"{name}_fp32"
        _remove_unused(model, value)


def trim_head(model: ir.Model, ids: npt.NDArray[np.int32]) -> None:
    """Keep only the head's rows of `ids`, in place: logit i is then that of token `ids[i]`."""
    head = find_head(model)
    weight = head.inputs[1]
    assert weight is not None and weight.const_value is not None
    # (inputs, ids), contiguous along the inputs, as the quantization reads it.
    columns = np.ascontiguousarray(weight.const_value.numpy().T[ids]).T
    trimmed = _add_initializer(model, f"{weight.name}_trimmed", columns)
    head.replace_input_with(1, trimmed)
    _remove_unused(model, weight)
    logits = head.outputs[0]
    leading = list(logits.shape)[:2] if logits.shape is not None else []
    logits.shape = ir.Shape([*(dim if isinstance(dim, int) else dim.value for dim in leading), len(ids)])


def find_head(model: ir.Model) -> ir.Node:
    """Find the MatMul that computes the logits."""
    head = _logits_producer(model)
    if head is None or not _is_weight_matmul(head):
        raise ValueError(
            f"the graph's logits come from {head and head.op_type}, not from a MatMul with the head's weight"
        )
    return head


def _logits_producer(model: ir.Model) -> ir.Node | None:
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    return logits.producer()


def _quantize_embedding(model: ir.Model, scheme: QuantizationScheme, shared: QuantizedBlocks | None) -> None:
    """Quantize the embedding; `shared` is the head's quantized weight if the embedding is tied to it."""
    table = model.graph.initializers.get(EMBEDDING)
    if table is None or table.const_value is None:
        return
    weight = table.const_value.numpy()
    # The operator has no padding.
    if weight.shape[1] % (GROUP_SIZE if scheme.fitted else BLOCK_SIZE):
        return
    (gather, _), *others = table.uses()
    assert gather.op_type == "Gather" and not others
    if shared is None:
        blocks = scheme.quantize(weight, scheme.head_bits)
        # The operator takes a matrix here; onnxruntime then reads only the rows that it needs from the file.
        matrix = blocks.packed.reshape(len(blocks.packed), -1)
        packed, scales, zeros = _add_blocks(model, EMBEDDING, replace(blocks, packed=matrix))
    else:
        blocks = shared
        stored, scales, zeros = _add_blocks(model, _quantized_head_name(model), blocks)
        shape = _add_initializer(model, f"{EMBEDDING}_shape", np.array([len(blocks.packed), -1], np.int64))
        reshape = ir.node("Reshape", [stored, shape], name="/model/embed_tokens/Reshape")
        packed = reshape.outputs[0]
        packed.name = "/model/embed_tokens/Reshape/output_0"
        model.graph.insert_before(gather, reshape)
    inputs = [packed, gather.inputs[1], scales, *([zeros] if zeros is not None else [])]
    attributes = {"bits": blocks.bits, "block_size": blocks.block_size, "gather_axis": 0, "quantize_axis": 1}
    lookup = ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=f"{gather.name}Quantized")
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    _replace_node(model, gather, lookup)
    _remove_unused(model, table)


def _quantized_head_name(model: ir.Model) -> str:
    """Name of the head's quantized weight, without its suffixes."""
    head = _logits_producer(model)
    assert head is not None and head.inputs[1] is not None
    return str(head.inputs[1].name).rpartition("_Q")[0]


def _quantized_matmul(model: ir.Model, node: ir.Node, name: str, blocks: QuantizedBlocks) -> ir.Node:
    packed, scales, zeros = _add_blocks(model, name, blocks)
    inputs = [node.inputs[0], packed, scales, *([zeros] if zeros is not None else [])]
    attributes = {
        "K": blocks.columns,
        "N": len(blocks.packed),
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    return ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=f"{node.name}_Q{blocks.bits}")


def _add_blocks(model: ir.Model, name: str, blocks: QuantizedBlocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Initializers of `blocks`: packed weights, scales, zero points."""
    packed = _add_initializer(model, f"{name}_Q{blocks.bits}G{blocks.block_size}", blocks.packed)
    scales = _add_scales(model, f"{name}_scale", blocks.scales)
    zeros = _add_initializer(model, f"{name}_zp", blocks.zeros) if blocks.zeros is not None else None
    return packed, scales, zeros


def _add_scales(model: ir.Model, name: str, scales: Weights) -> ir.Value:
    """The float32 value `name`: `scales`, stored in float16 as `round_scales` rounds them."""
    for node in model.graph:
        if node.name == name:
            return node.outputs[0]
    unit = scale_unit(torch.from_numpy(scales)).numpy()
    half = _add_initializer(model, f"{name}_fp16", (scales / unit).astype(np.float16))
    factor = _add_initializer(model, f"{name}_unit", unit)
    cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_cast")
    cast.outputs[0].name = f"{name}_normalized"
    product = ir.node("Mul", [cast.outputs[0], factor], name=name)
    product.outputs[0].name = name
    model.graph.insert_before(next(iter(model.graph)), [cast, product])
    return product.outputs[0]


def _add_initializer(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """The initializer `name`; it is created with `array` if it does not exist."""
    existing = model.graph.initializers.get(name)
    if existing is not None:
        return existing
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _is_weight_matmul(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.is_initializer() and len(weight.shape or ()) == 2


def _replace_node(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    convenience.replace_nodes_and_values(
        model.graph,
        insertion_point=old,
        old_nodes=[old],
        new_nodes=[new],
        old_values=old.outputs,
        new_values=new.outputs,
    )


def _remove_unused(model: ir.Model, value: ir.Value) -> None:
    if not value.uses():
        del model.graph.initializers[str(value.name)]


def _round(
    weight: Weights, bits: int, k_quant: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Values, scales and zero points of the blocks of `weight`, computed by onnxruntime."""
    from onnxruntime.quantization.neural_compressor import weight_only

    if k_quant:
        # The scale of a block of zeros is a division by zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            values, scales, zeros = weight_only.quant_tensor_k_quant_cpu(weight, bits, BLOCK_SIZE)
    else:
        values, scales, zeros = weight_only.quant_tensor(weight, bits, BLOCK_SIZE, "sym", "uint")
    return values, scales, zeros


def _pack(values: Packed, bits: int) -> Packed:
    """Pack 4-bit values two to a byte, the first in the lower half; (rows, n) to (rows, n / 2), rounded up."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)), constant_values=8)
    packed: Packed = (values[:, ::2] | values[:, 1::2] << 4).astype(np.uint8)
    return packed


def unpack(packed: Packed, bits: int) -> Packed:
    """Return the values of packed rows, one to a byte; (rows, n) to (rows, 8 n / bits)."""
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
