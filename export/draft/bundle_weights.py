"""Reads a draft's weights back from its bundle, to train it further.

The draft's directory may be gone when a later training is to start from the draft that boards have. The weights are
those that boards compute with: matrices rounded to 8 bits or fewer, which training soon corrects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from transformers import PreTrainedModel

from cloud_verifier.draft_models.checkpoint import new_draft, read_shared_tensors
from cloud_verifier.draft_models.layouts import DraftPlan, freeze_shared
from cloud_verifier.registry.checkpoint import load_config
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import InputError
from export.bundle.quantize import EMBEDDING, unpack

Weights = npt.NDArray[np.float32]
# Names of a block's tensors in the graph, and in the model, where several, in this order, make up one of the graph's.
BLOCK_TENSORS = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "attn.qkv_proj.MatMul.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.o_proj.MatMul.weight": ("self_attn.o_proj.weight",),
    "mlp.gate_proj.MatMul.weight": ("mlp.gate_proj.weight",),
    "mlp.up_proj.MatMul.weight": ("mlp.up_proj.weight",),
    "mlp.down_proj.MatMul.weight": ("mlp.down_proj.weight",),
}
HEAD = "lm_head.MatMul.weight"


def read_draft(bundle: Path, target_directory: Path) -> tuple[PreTrainedModel, DraftPlan]:
    """Rebuild the PyTorch draft of a bundle, in float32 on the CPU, with its shared parameters frozen.

    Args:
        bundle: with a fused graph, as `draft-export onnx` makes it by default.
        target_directory: the target that the draft was made for.

    Raises:
        BundleError: the bundle cannot be read.
        InputError: the graph has no tensor that the draft needs, for example because its head is trimmed.
        TargetError: the target's checkpoint cannot be read.
    """
    opened = read_bundle(bundle)
    config, layers = load_config(target_directory), opened.manifest.architecture.layers
    shared = opened.manifest.shared
    plan = DraftPlan(shared.layout, layers - shared.blocks, shared.blocks, config.num_hidden_layers)
    draft = new_draft(config, plan)
    values = _model_tensors(_graph_weights(opened.graph_path), layers, dict(draft.named_parameters()))
    values |= {name: tensor.float() for name, tensor in read_shared_tensors(target_directory, plan).items()}
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            value = values.get(name)
            if value is None or value.shape != parameter.shape:
                raise InputError(f"{bundle} cannot be trained on: its graph does not hold the draft's {name}")
            parameter.copy_(value)
    freeze_shared(draft, plan)
    return draft, plan


def _model_tensors(
    weights: Mapping[str, Weights], layers: int, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the graph's tensors by the names that they have in the model."""
    names = {
        "lm_head.weight": HEAD,
        "model.embed_tokens.weight": EMBEDDING if EMBEDDING in weights else HEAD,
        "model.norm.weight": f"model.layers.{layers}.final_norm_layernorm.weight",
    }
    tensors = {name: torch.from_numpy(weights[stored]) for name, stored in names.items() if stored in weights}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for stored, suffixes in BLOCK_TENSORS.items():
            parts = [prefix + suffix for suffix in suffixes]
            sizes = [len(parameters[part]) for part in parts]
            whole = weights.get(prefix + stored)
            if whole is not None and len(whole) == sum(sizes):
                tensors |= dict(zip(parts, torch.split(torch.from_numpy(whole), sizes), strict=True))
    return tensors


def _graph_weights(graph: Path) -> dict[str, Weights]:
    """Return the tensors of a graph by name, quantized ones dequantized; matrices have the shape (outputs, inputs)."""
    model = onnx.load(graph)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for name, array in stored.items():
        if array.dtype in (np.float32, np.float16):
            # MatMul takes (inputs, outputs).
            whole = name.removesuffix("_fp16")
            weights[whole] = np.array(array.T if whole.endswith("MatMul.weight") else array, np.float32)
    return weights | dict(_quantized_tensors(model.graph.node, stored))


def _quantized_tensors(nodes: Any, stored: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, Weights]]:
    """Yield name and values of quantized matrices and embeddings, stored as `export.bundle.quantize` does."""
    for node in nodes:
        if node.op_type == "MatMulNBits":
            name, scale_name, *zero_name = node.input[1:]
        elif node.op_type == "GatherBlockQuantized":
            name, _, scale_name, *zero_name = node.input
        else:
            continue
        # An embedding that is tied to the head has no tensor of its own.
        if name not in stored:
            continue
        options = {attribute.name: attribute.i for attribute in node.attribute}
        bits = options["bits"]
        # Scales are stored in float16, relative to a unit.
        scales = stored[f"{scale_name}_fp16"].astype(np.float32) * stored[f"{scale_name}_unit"]
        rows, blocks = scales.shape
        levels = unpack(stored[name].reshape(rows, -1), bits).astype(np.float32).reshape(rows, blocks, -1)
        zeros: Any = np.float32(1 << bits - 1)
        if zero_name:
            zeros = unpack(stored[zero_name[0]], bits)[:, :blocks, None].astype(np.float32)
        values = ((levels - zeros) * scales[..., None]).reshape(rows, -1)
        yield name.rpartition("_Q")[0], values[:, : options.get("K", values.shape[1])]
