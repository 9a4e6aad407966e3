"""Fewer bits for the weights of an ONNX graph, and fewer rows for its head.

Works on onnxruntime-genai's graph and on optimum's alike: both name a block's projections the same way and multiply by
constants. One weight at a time is in memory as float, a piece of it at a time as the rounding's float64, so a draft of
an 8B target is quantised in little more than what its float32 tensors take.

The rounding is onnxruntime's own (`neural_compressor`, ported from Intel's), the layout that of its MatMulNBits and
GatherBlockQuantized: blocks of 32 along the input, each with a float32 scale. All graphs use `accuracy_level=4` (int8
arithmetic), without which 8-bit MatMulNBits is 15 times slower. The embedding gets the head's bits, and shares its
bytes where the model ties them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import convenience

BLOCK_SIZE = 32
ACCURACY_LEVEL = 4
DOMAIN = "com.microsoft"
LOGITS = "logits"
EMBEDDING = "model.embed_tokens.weight"
# Weights that go through the rounding at once: it holds some five float64 copies of them.
PIECE = 1 << 24
# Below this, a tensor is left as it is: norms and biases cost nothing and matter.
SMALLEST_HALF = 4096


@dataclass(frozen=True)
class Scheme:
    """How the weights of a graph are stored.

    Attributes:
        bits: of every projection, 4 or 8.
        head_bits: of head and embedding; 32 leaves them float.
        k_quant: llama.cpp's search for scales and zero points, instead of rounding to nearest with symmetric scales.
        sensitive: the projections that llama.cpp's mixtures spare get 8 bits.
    """

    bits: int
    head_bits: int
    k_quant: bool = False
    sensitive: bool = False

    def bits_of(self, node: str, layers: int) -> int:
        """Bits of the projection that the MatMul `node` of a model with so many `layers` is."""
        if not self.sensitive or not node.endswith(("qkv_proj/MatMul", "v_proj/MatMul", "down_proj/MatMul")):
            return self.bits
        layer = int(node.split("/model/layers.")[1].split("/")[0])
        # The same blocks as onnxruntime-genai's `k_quant_mixed`: the first and last eighth, and every third between.
        spared = layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2
        return 8 if spared else self.bits


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8, 8),
    "mixed": Scheme(4, 8, k_quant=True, sensitive=True),
    "int4-head8": Scheme(4, 8),
    "int4-head32": Scheme(4, 32),
    "int4-k": Scheme(4, 4, k_quant=True),
    "int4": Scheme(4, 4),
}


@dataclass(frozen=True)
class Blocks:
    """A weight of `rows` outputs and `columns` inputs in blocks along the inputs.

    Attributes:
        packed: (rows, blocks, BLOCK_SIZE * bits / 8) uint8.
        scales: (rows, blocks) float32.
        zeros: (rows, bytes) uint8, packed like the weights; None where 2^(bits-1) is zero everywhere.
    """

    bits: int
    columns: int
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None


def to_blocks(weight: npt.NDArray[np.float32], bits: int, k_quant: bool) -> Blocks:
    """Rounds `weight` (rows, columns); a last block that is not full is filled with zeros."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK_SIZE)
    packed = np.empty((rows, blocks, BLOCK_SIZE * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, _bytes(blocks, bits)), np.uint8) if k_quant else None
    step = max(1, PIECE // (blocks * BLOCK_SIZE))
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        padded = np.pad(weight[piece], ((0, 0), (0, blocks * BLOCK_SIZE - columns)))
        values, scale, zero = _round(padded, bits, k_quant)
        packed[piece] = _pack(values.reshape(len(padded), -1).astype(np.uint8), bits).reshape(len(padded), blocks, -1)
        scales[piece] = scale.reshape(-1, blocks)
        if zeros is not None:
            zeros[piece] = _pack(zero.reshape(-1, blocks).astype(np.uint8), bits)
    return Blocks(bits, columns, packed, scales, zeros)


def quantise(model: ir.Model, scheme: Scheme, layers: int, *, tied: bool) -> None:
    """Stores the projections, the head and the embedding of `model` as `scheme` says.

    Args:
        layers: blocks of the model.
        tied: the embedding is the head's weight.
    """
    head = head_of(model)
    tables: Blocks | None = None
    for node in list(model.graph):
        if not _multiplies_by_weight(node):
            continue
        bits = scheme.head_bits if node is head else scheme.bits_of(str(node.name), layers)
        if bits == 32:
            continue
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        blocks = to_blocks(weight.const_value.numpy().T, bits, scheme.k_quant)
        _replace(model, node, _multiplication(model, node, str(weight.name), blocks))
        _drop(model, weight)
        if node is head:
            tables = blocks
    if scheme.head_bits != 32:
        _quantise_embedding(model, scheme, tables if tied else None)


def halve(model: ir.Model) -> None:
    """Stores large float32 tensors as float16; onnxruntime widens them when it loads the graph."""
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST_HALF:
            continue
        half = _initializer(model, f"{name}_fp16", tensor.numpy().astype(np.float16))
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_widened")
        uses = list(value.uses())
        for user, index in uses:
            user.replace_input_with(index, cast.outputs[0])
        model.graph.insert_before(next(iter(model.graph)), cast)
        cast.outputs[0].name = f"{name}_fp32"
        _drop(model, value)


def trim_head(model: ir.Model, ids: npt.NDArray[np.int32]) -> None:
    """Leaves of the head only the rows of `ids`: logit i is then that of token `ids[i]`."""
    head = head_of(model)
    weight = head.inputs[1]
    assert weight is not None and weight.const_value is not None
    # (inputs, ids); contiguous the other way round, as quantising wants it.
    columns = np.ascontiguousarray(weight.const_value.numpy().T[ids]).T
    trimmed = _initializer(model, f"{weight.name}_trimmed", columns)
    head.replace_input_with(1, trimmed)
    _drop(model, weight)
    logits = head.outputs[0]
    logits.shape = ir.Shape([*list(logits.shape or ())[:2], len(ids)])


def head_of(model: ir.Model) -> ir.Node:
    """The multiplication that makes the logits."""
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    head = logits.producer()
    if head is None or not _multiplies_by_weight(head):
        raise ValueError(
            f"the graph's logits come from {head and head.op_type}, not from a MatMul with the head's weight"
        )
    return head


def _quantise_embedding(model: ir.Model, scheme: Scheme, shared: Blocks | None) -> None:
    table = model.graph.initializers.get(EMBEDDING)
    if table is None or table.const_value is None or table.const_value.shape[1] % BLOCK_SIZE:
        return
    (gather, _), *others = table.uses()
    assert gather.op_type == "Gather" and not others
    if shared is None:
        blocks = to_blocks(table.const_value.numpy(), scheme.head_bits, scheme.k_quant)
        # Flat, as the operator wants it: onnxruntime then reads the rows that it needs from the file.
        packed, scales, zeros = _tensors(model, EMBEDDING, replace(blocks, packed=_flat(blocks.packed)))
    else:
        blocks = shared
        stored, scales, zeros = _tensors(model, head_name(model), blocks)
        shape = _initializer(model, f"{EMBEDDING}_shape", np.array([len(blocks.packed), -1], np.int64))
        reshape = ir.node("Reshape", [stored, shape], name="/model/embed_tokens/Reshape")
        packed = reshape.outputs[0]
        packed.name = "/model/embed_tokens/Reshape/output_0"
        model.graph.insert_before(gather, reshape)
    inputs = [packed, gather.inputs[1], scales, *([zeros] if zeros is not None else [])]
    settings = {"bits": blocks.bits, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
    looked_up = ir.node("GatherBlockQuantized", inputs, settings, domain=DOMAIN, name=f"{gather.name}Quantized")
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    _replace(model, gather, looked_up)
    _drop(model, table)


def _flat(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return packed.reshape(len(packed), -1)


def head_name(model: ir.Model) -> str:
    """Name under which the head's quantised weight is stored, without its suffixes."""
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    head = logits.producer()
    assert head is not None and head.inputs[1] is not None
    return str(head.inputs[1].name).rpartition("_Q")[0]


def _multiplication(model: ir.Model, node: ir.Node, name: str, blocks: Blocks) -> ir.Node:
    packed, scales, zeros = _tensors(model, name, blocks)
    inputs = [node.inputs[0], packed, scales, *([zeros] if zeros is not None else [])]
    settings = {
        "K": blocks.columns,
        "N": len(blocks.packed),
        "bits": blocks.bits,
        "block_size": BLOCK_SIZE,
        "accuracy_level": ACCURACY_LEVEL,
    }
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    return ir.node("MatMulNBits", inputs, settings, domain=DOMAIN, name=f"{node.name}_Q{blocks.bits}")


def _tensors(model: ir.Model, name: str, blocks: Blocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """The initializers of `blocks`, made once."""
    arrays = ((f"{name}_Q{blocks.bits}G{BLOCK_SIZE}", blocks.packed), (f"{name}_scale", blocks.scales))
    packed, scales = (_initializer(model, label, array) for label, array in arrays)
    zeros = _initializer(model, f"{name}_zp", blocks.zeros) if blocks.zeros is not None else None
    return packed, scales, zeros


def _initializer(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _multiplies_by_weight(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.is_initializer() and len(weight.shape or ()) == 2


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    convenience.replace_nodes_and_values(model.graph, old, [old], [new], old.outputs, new.outputs)


def _drop(model: ir.Model, value: ir.Value) -> None:
    if not value.uses():
        del model.graph.initializers[value.name]


def _round(
    weight: npt.NDArray[np.float32], bits: int, k_quant: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Values, scales and zero points of the blocks of `weight`, by onnxruntime."""
    from onnxruntime.quantization.neural_compressor import weight_only

    if k_quant:
        # A block of zeros has no scale to find.
        with np.errstate(divide="ignore", invalid="ignore"):
            return weight_only.quant_tensor_k_quant_cpu(weight, bits, BLOCK_SIZE)
    return weight_only.quant_tensor(weight, bits, BLOCK_SIZE, "sym", "uint")


def _pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Two values of 4 bits a byte, the first in the lower half; (rows, n) to (rows, n / 2), rounded up."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)), constant_values=8)
    return values[:, ::2] | values[:, 1::2] << 4


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
