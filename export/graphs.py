"""From a draft in PyTorch to an ONNX graph: optimum's as the reference, onnxruntime-genai's fused one as the fast path.

    fp32    every weight as it is
    int8    MatMulNBits, 8 bits, blocks of 32
    int4    the same with 4 bits
    mixed   4 bits with k-quant rounding, but 8 for the head, the embedding, and the layers that mind most

All quantised graphs use `accuracy_level=4` (int8 arithmetic), without which 8-bit MatMulNBits is 15 times slower, and
share the head's weights with a tied embedding.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx

from edge_runtime.contract.errors import InputError

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
KINDS = {"fused": ("int4", "mixed", "int8", "fp32"), "concat": ("fp32",)}
BLOCK_SIZE = 32
# The builder's algorithm and whether its blocks are symmetric. Its k-quant always stores zero points, and always an
# 8-bit head, so `k_quant` by name and symmetric blocks with it give graphs that do not load (0.13.2).
ALGORITHMS = {"int4": ("rtn", True), "mixed": ("k_quant_mixed", False), "int8": ("rtn_last", True)}


def export_graph(model: Path, output: Path, kind: str, weights: str) -> None:
    """Writes GRAPH_FILE, and WEIGHTS_FILE beside it, into `output`.

    Args:
        model: a Hugging Face directory with fp32 weights.
        kind: `fused` or `concat`.
        weights: one of KINDS[kind].

    Raises:
        InputError: this kind of graph does not come with these weights.
    """
    if weights not in KINDS.get(kind, ()):
        offers = "; ".join(f"{name}: {', '.join(choices)}" for name, choices in KINDS.items())
        raise InputError(f"no {kind} graph with {weights} weights; there are {offers}")
    output.mkdir(parents=True, exist_ok=True)
    with _quiet():
        if kind == "fused":
            _export_fused(model, output, weights)
        else:
            _export_concat(model, output)


def _export_fused(model: Path, output: Path, weights: str) -> None:
    import onnxruntime_genai.models.builder as builder  # isort: skip - puts its own folder on the path ...
    from builders import base  # isort: skip - ... and imports itself from there

    scratch = output / "builder"
    options: dict[str, object] = {
        # Only the last position's logits: a prompt of 1000 tokens would otherwise want 1000 rows of the head.
        "prune_lm_head": True,
        "hf_remote": False,
        "hf_token": "false",
    }
    if weights != "fp32":
        algorithm, symmetric = ALGORITHMS[weights]
        options |= {
            "int4_block_size": BLOCK_SIZE,
            "int4_accuracy_level": 4,
            "int4_algo_config": algorithm,
            "int4_is_symmetric": symmetric,
        }
    with _all_matmuls_in_8_bits(base.Model) if weights == "int8" else contextlib.nullcontext():
        precision = "fp32" if weights == "fp32" else "int4"
        builder.create_model("", str(model), str(scratch), precision, "cpu", str(scratch), **options)
    for name in (GRAPH_FILE, WEIGHTS_FILE):
        shutil.move(scratch / name, output / name)
    shutil.rmtree(scratch)


@contextlib.contextmanager
def _all_matmuls_in_8_bits(builder_model: type) -> Iterator[None]:
    """The builder knows 8 bits only for single nodes; this names all of them.

    Its own plan for an 8-bit head, which it shares with the embedding, stays.
    """
    original = builder_model.make_int4_algo_config  # type: ignore[attr-defined]

    def every_node(self: object, method: str) -> object:
        config = original(self, method)
        matmuls = ("attn/qkv_proj", "attn/q_proj", "attn/k_proj", "attn/v_proj", "attn/o_proj")
        matmuls += ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
        for layer in range(self.num_layers):  # type: ignore[attr-defined]
            for name in matmuls:
                config.customized_weight_config[f"/model/layers.{layer}/{name}/MatMul"] = {"bits": 8}
        return config

    builder_model.make_int4_algo_config = every_node  # type: ignore[attr-defined]
    try:
        yield
    finally:
        builder_model.make_int4_algo_config = original  # type: ignore[attr-defined]


def _export_concat(model: Path, output: Path) -> None:
    from optimum.exporters.onnx import main_export

    scratch = output / "optimum"
    main_export(str(model), scratch, task="text-generation-with-past", do_validation=False, no_post_process=True)
    graph = onnx.load(scratch / GRAPH_FILE)
    onnx.save(graph, output / GRAPH_FILE, save_as_external_data=True, location=WEIGHTS_FILE, size_threshold=1024)
    shutil.rmtree(scratch)


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
