"""From a draft in PyTorch to an ONNX graph: optimum's as the reference, onnxruntime-genai's fused one as the fast path.

    fp32          every weight as it is
    fp16          stored in half the bytes, computed as fp32
    int8          8 bits, blocks of 32
    mixed         4 bits with k-quant rounding, but 8 for the head, the embedding, and the layers that mind most
    int4          4 bits, head and embedding too
    int4-k        the same with k-quant rounding
    int4-head8    4 bits, but 8 for head and embedding
    int4-head32   4 bits, head and embedding as they are

`export.bundle.quantize` says more. A head may be trimmed to the ids that matter (see `export.bundle.vocab_trim`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from transformers import PreTrainedModel

from edge_runtime.protocol.errors import InputError
from export.bundle.quantize import EMBEDDING, SCHEMES, halve, quantise, trim_head

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
WEIGHTS = ("fp32", "fp16", *SCHEMES)
KINDS = ("fused", "concat")
# onnxruntime-genai's class for each model type.
BUILDERS = {
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
) -> None:
    """Writes GRAPH_FILE, and WEIGHTS_FILE beside it, into `output`.

    Args:
        draft: in float32, on the CPU.
        kind: one of KINDS.
        weights: one of WEIGHTS.
        head: the ids that the head keeps, ascending; None for all.
        context: longest text in tokens, by which a fused graph has its rotary tables; None for the model's.

    Raises:
        InputError: there is no such graph, or no builder for this architecture.
        OSError: the disk is full, or `output` cannot be written.
    """
    check_form(kind, weights)
    if draft.config.model_type not in BUILDERS:
        raise InputError(f"cannot export model type {draft.config.model_type!r}: known are {', '.join(BUILDERS)}")
    tied = bool(draft.config.tie_word_embeddings)
    with tempfile.TemporaryDirectory(prefix=".graph-", dir=output) as scratch, _quiet():
        if kind == "fused":
            # float graphs let the embedding read the head's weight; a trimmed head no longer has it all.
            shared = tied and head is None and weights in ("fp32", "fp16")
            model = _fused(draft, Path(scratch), context, shared)
        else:
            model = _concat(draft, Path(scratch))
        if head is not None:
            trim_head(model, head)
        if weights in SCHEMES:
            quantise(model, SCHEMES[weights], draft.config.num_hidden_layers, tied=tied and head is None)
        elif weights == "fp16":
            halve(model)
        model.graph.sort()
        ir.save(model, output / GRAPH_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=1024)


def check_form(kind: str, weights: str) -> None:
    """Raises InputError where there is no such graph or no such weights."""
    if kind not in KINDS or weights not in WEIGHTS:
        raise InputError(
            f"no {kind} graph with {weights} weights; graphs are {', '.join(KINDS)}, weights {', '.join(WEIGHTS)}"
        )


def _fused(draft: PreTrainedModel, scratch: Path, context: int | None, shared: bool) -> ir.Model:
    import onnxruntime_genai.models.builder  # isort: skip # noqa: F401 - puts its own folder on the path ...
    import builders  # isort: skip - ... and imports itself from there

    config = copy.deepcopy(draft.config)
    config.architectures = [type(draft).__name__]
    options = {
        # Only the last position's logits: a prompt of 1000 tokens would otherwise want 1000 rows of the head.
        "prune_lm_head": True,
        "shared_embeddings": shared,
        "hf_remote": False,
        "hf_token": "false",
    }
    build = getattr(builders, BUILDERS[config.model_type])
    builder = build(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(scratch), options)
    builder.rope_attrs["cache_length"] = context or config.max_position_embeddings
    # It would read the model from disk; here it is in memory already, and may be large.
    builder.load_weights = lambda path: draft
    builder.make_model("")
    return builder.model


def _concat(draft: PreTrainedModel, scratch: Path) -> ir.Model:
    from optimum.exporters.onnx import main_export

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
def _quiet() -> Iterator[None]:
    """Exporters print a line per tensor and warn about themselves; errors still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _stderr_to_nowhere():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _stderr_to_nowhere() -> contextlib.AbstractContextManager[object]:
    # Their progress bars write to standard error; ours is the one that people see.
    return contextlib.redirect_stderr(io.StringIO())
