"""Exports a PyTorch draft to an ONNX graph: optimum's as the reference, onnxruntime-genai's fused one as the fast path.

    fp32          all weights as they are
    fp16          stored as float16, computed as float32
    int8          8 bits, blocks of 32
    int8-head4    8 bits; 4 bits for head and embedding, which a draft can be trained with
    int4-fitted   4 bits that a draft must be trained with, head and embedding too
    mixed         4 bits with k-quant rounding; 8 bits for the head, the embedding, and the most sensitive layers
    int4          4 bits, head and embedding too
    int4-k        the same with k-quant rounding
    int4-head8    4 bits; 8 bits for head and embedding
    int4-head32   4 bits; head and embedding as they are

`export.bundle.quantize` defines the quantization. A head may be trimmed to some ids (see `export.bundle.vocab_trim`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel

from edge_runtime.protocol.errors import InputError
from export.bundle.quantize import (
    EMBEDDING,
    QUANTIZATION_SCHEMES,
    quantize_model,
    store_half_precision,
    trim_head,
)

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
WEIGHT_TYPES = ("fp32", "fp16", *QUANTIZATION_SCHEMES)
GRAPH_KINDS = ("fused", "concat")
# Tensors of at least this size are stored in WEIGHTS_FILE instead of the graph.
EXTERNAL_TENSOR_BYTES = 1024
# onnxruntime-genai's builder class for each model type.
GENAI_BUILDERS = {
    "llama": "LlamaModel",
    "qwen2": "QwenModel",
    "qwen3": "Qwen3Model",
    "mistral": "MistralModel",
    "gemma": "GemmaModel",
}


def export_graph(
    draft: PreTrainedModel,
    output: Path,
    kind: str,
    weights: str,
    *,
    head: npt.NDArray[np.int32] | None = None,
    context: int | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write GRAPH_FILE and WEIGHTS_FILE into the directory `output`.

    Args:
        draft: in float32, on the CPU.
        kind: one of GRAPH_KINDS.
        weights: one of WEIGHT_TYPES.
        head: ids that the head keeps, ascending; None for all.
        context: longest text in tokens, the length of a fused graph's rotary tables; None for the model's.
        check: called with the path of the float32 graph with its whole head, before that is trimmed and its weights are
            rounded; what it raises ends the export.

    Raises:
        InputError: there is no such variant, no builder for this architecture, or its RoPE changes within the context.
        OSError: the disk is full, or `output` cannot be written.
    """
    check_variant(kind, weights)
    if draft.config.model_type not in GENAI_BUILDERS:
        raise InputError(
            f"cannot export model type {draft.config.model_type!r}: supported are {', '.join(GENAI_BUILDERS)}"
        )
    limit = context or draft.config.max_position_embeddings
    _check_rope(draft.config, limit)
    tied = bool(draft.config.tie_word_embeddings)
    with tempfile.TemporaryDirectory(prefix=".graph-", dir=output) as scratch, _silence_exporters():
        if kind == "fused":
            # In float graphs the embedding reads the head's weight, unless the head is trimmed and lacks rows.
            shared = tied and head is None and weights in ("fp32", "fp16")
            model = _build_fused_graph(draft, Path(scratch), limit, shared)
        else:
            model = _build_concat_graph(draft, Path(scratch))
        if check is not None:
            with tempfile.TemporaryDirectory(prefix=".float-", dir=output) as float_graph:
                _save(model, Path(float_graph))
                check(Path(float_graph) / GRAPH_FILE)
        if head is not None:
            trim_head(model, head)
        if weights in QUANTIZATION_SCHEMES:
            scheme = QUANTIZATION_SCHEMES[weights]
            quantize_model(model, scheme, draft.config.num_hidden_layers, tied=tied and head is None)
        elif weights == "fp16":
            store_half_precision(model)
        _save(model, output)


def check_variant(kind: str, weights: str) -> None:
    """Raise InputError if there is no such kind of graph or weight type."""
    if kind not in GRAPH_KINDS or weights not in WEIGHT_TYPES:
        raise InputError(
            f"no {kind} graph with {weights} weights; graphs are {', '.join(GRAPH_KINDS)}, "
            f"weights {', '.join(WEIGHT_TYPES)}"
        )


def _save(model: ir.Model, directory: Path) -> None:
    model.graph.sort()
    ir.save(model, directory / GRAPH_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=EXTERNAL_TENSOR_BYTES)


def _check_rope(config: PretrainedConfig, context: int) -> None:
    """Raise InputError if the angles of a position depend on the text's length: a graph has one table of them.

    The scaling `dynamic` leaves texts up to the model's context as they are, and no draft has a longer one.
    """
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) != "longrope":
        return
    switch = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    if context > switch:
        raise InputError(
            f"this model changes its RoPE factors for texts beyond {switch} tokens, which a draft's graph cannot "
            f"express: bound its texts with --context {switch}"
        )


def _rotary_tables(draft: PreTrainedModel, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `context` positions, (context, head_dim) each, as the model itself computes them."""
    rotary: Any = draft.base_model.rotary_emb
    with torch.no_grad():
        cosines, sines = rotary(torch.empty(0, dtype=torch.float32), torch.arange(context)[None])
    return cosines[0], sines[0]


def _compute_rotary_tables(model: ir.Model, draft: PreTrainedModel, context: int) -> None:
    """Replace the rotary tables by nodes that compute them, which onnxruntime does once, when it loads the graph.

    As data they would take 2 MB for 8192 positions of 64 dimensions, and 34 MB for 131072 positions.
    """
    rotary: Any = draft.base_model.rotary_emb
    frequencies, scaling = rotary.inv_freq.float().cpu(), float(rotary.attention_scaling)
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies
    if not torch.allclose(angles.cos() * scaling, _rotary_tables(draft, context)[0][:, : len(frequencies)], atol=1e-4):
        return
    constants = {
        "start": np.float32(0),
        "end": np.float32(context),
        "step": np.float32(1),
        "axis": np.array([1], np.int64),
        "frequencies": frequencies.numpy()[None],
        "scaling": np.float32(scaling),
    }
    inputs = {name: _constant(model, f"rotary_{name}", np.asarray(array)) for name, array in constants.items()}
    positions = ir.node("Range", [inputs["start"], inputs["end"], inputs["step"]], name="/rotary/Range")
    column = ir.node("Unsqueeze", [positions.outputs[0], inputs["axis"]], name="/rotary/Unsqueeze")
    product = ir.node("Mul", [column.outputs[0], inputs["frequencies"]], name="/rotary/Mul")
    nodes = [positions, column, product]
    for table, function in (("cos_cache", "Cos"), ("sin_cache", "Sin")):
        unscaled = ir.node(function, [product.outputs[0]], name=f"/rotary/{function}")
        scaled = ir.node("Mul", [unscaled.outputs[0], inputs["scaling"]], name=f"/rotary/{function}/Mul")
        nodes += [unscaled, scaled]
        value = model.graph.initializers.pop(table)
        for user, index in list(value.uses()):
            user.replace_input_with(index, scaled.outputs[0])
    for node in nodes:
        node.outputs[0].name = f"{node.name}/output_0"
    model.graph.insert_before(next(iter(model.graph)), nodes)


def _constant(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _build_fused_graph(draft: PreTrainedModel, scratch: Path, context: int, shared: bool) -> ir.Model:
    # The first import puts its own folder on sys.path; the builder imports itself from there as `builders`.
    import onnxruntime_genai.models.builder  # type: ignore[import-untyped]  # isort: skip # noqa: F401
    import builders  # type: ignore[import-not-found]  # isort: skip

    config = copy.deepcopy(draft.config)
    config.architectures = [type(draft).__name__]
    # The builder knows some kinds of RoPE scaling, reads others as plain, and takes the extended context for the
    # original one. It gets finished tables instead.
    config.rope_scaling = None
    options = {
        # Logits of the last position only: a prompt of 1000 tokens would otherwise need 1000 rows of logits.
        "prune_lm_head": True,
        "shared_embeddings": shared,
        "hf_remote": False,
        "hf_token": "false",
    }
    build = getattr(builders, GENAI_BUILDERS[config.model_type])
    builder = build(
        config,
        io_dtype=ir.DataType.FLOAT,
        onnx_dtype=ir.DataType.FLOAT,
        ep="cpu",
        cache_dir=str(scratch),
        extra_options=options,
    )
    builder.make_rotary_embedding_caches_from_scratch = lambda: _rotary_tables(draft, context)
    # The builder would read the model from disk; it is already in memory, and may be large.
    builder.load_weights = lambda path: draft
    builder.make_model("")
    model: ir.Model = builder.model
    _compute_rotary_tables(model, draft, context)
    return model


def _build_concat_graph(draft: PreTrainedModel, scratch: Path) -> ir.Model:
    from optimum.exporters.onnx import main_export  # type: ignore[import-untyped]

    draft.save_pretrained(scratch / "draft")
    main_export(
        str(scratch / "draft"),
        scratch / "optimum",
        task="text-generation-with-past",
        do_validation=False,
        no_post_process=True,
    )
    model = ir.load(scratch / "optimum" / GRAPH_FILE)
    assert EMBEDDING in model.graph.initializers
    return model


@contextlib.contextmanager
def _silence_exporters() -> Iterator[None]:
    """Suppress the exporters' output: a line per tensor, progress bars, warnings. Exceptions still propagate."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
