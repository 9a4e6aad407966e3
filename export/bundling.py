"""From a draft checkpoint to a bundle: graph, tokenizer, manifest, and the measurements that go into it."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edge_runtime.contract.bundle import (
    FORMAT_VERSION,
    Architecture,
    Graph,
    Manifest,
    Parity,
    SharedTensors,
    Vocabulary,
    record_file,
    vocabulary_hash,
    write_manifest,
)
from edge_runtime.contract.coupling import Chooser, Sampling
from edge_runtime.contract.errors import InputError
from edge_runtime.graphs import Runner, make_runner
from export.checkpoints import read_tensors, tensor_files
from export.drafts import DESCRIPTION, load_draft, read_description
from export.graphs import GRAPH_FILE, export_graph
from export.layouts import DraftPlan, describe_shared

# Packages whose release can change the bytes of a bundle.
MAKERS = ("flexspec", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "optimum")
TEMPERATURES = (0.0, 0.7, 1.0)

Report = Callable[[str], None]


@dataclass(frozen=True)
class BundleOrder:
    """What to make.

    Attributes:
        target: directory of the target that the draft was trained for.
        draft: directory of the draft's own tensors (see `export.drafts`), or of a whole Hugging Face model, which is
            then a standalone draft.
        kind, weights: see `export.graphs`.
        context: longest text of the draft in tokens; None for the model's.
        text: what parity and acceptance are measured on.
        positions: how many positions of it.
    """

    target: Path
    draft: Path
    kind: str
    weights: str
    text: str
    context: int | None = None
    positions: int = 2000


def make_bundle(order: BundleOrder, output: Path, report: Report) -> Manifest:
    """Makes a bundle at `output`, which must not exist; it appears there whole or not at all.

    Args:
        report: called with what comes next, once per step of `STEPS`.

    Raises:
        FlexSpecError: target or draft cannot be used, or the graph does not match PyTorch.
        FileExistsError: `output` exists.
    """
    if output.exists():
        raise InputError(f"{output} exists already; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        work = Path(scratch) / "bundle"
        work.mkdir()
        report("draft")
        draft, plan = _load(order)
        whole = Path(scratch) / "draft"
        draft.save_pretrained(whole)
        tokenizer = _copy_tokenizer(order.target, work)
        shutil.copyfile(order.target / "tokenizer.json", whole / "tokenizer.json")
        report("graph")
        export_graph(whole, work, order.kind, order.weights)
        architecture = _architecture(draft.config, order.context)
        report("parity")
        ids = tokenizer.encode(order.text).ids[: order.positions]
        if len(ids) < 2:
            raise InputError("the text to measure on is too short; give a longer one with --text")
        logits = _onnx_logits(work / GRAPH_FILE, architecture, ids)
        parity = _parity(logits, _torch_logits(draft, ids))
        report("acceptance")
        target = AutoModelForCausalLM.from_pretrained(order.target, dtype=torch.float32).eval()
        acceptance = _acceptance(logits, _torch_logits(target, ids))
        report("manifest")
        manifest = Manifest(
            FORMAT_VERSION,
            output.name,
            architecture,
            _vocabulary(tokenizer),
            _shared(order.target, plan),
            Graph(GRAPH_FILE, order.kind, order.weights),
            parity,
            {path.name: record_file(path) for path in sorted(work.iterdir())},
            acceptance,
            {name: importlib.metadata.version(name) for name in MAKERS},
        )
        write_manifest(work, manifest)
        work.rename(output)
    return manifest


STEPS = ("draft", "graph", "parity", "acceptance", "manifest")


def _load(order: BundleOrder) -> tuple[PreTrainedModel, DraftPlan | None]:
    if (order.draft / DESCRIPTION).exists():
        return load_draft(order.draft, order.target), read_description(order.draft).plan
    if not (order.draft / "config.json").exists():
        raise InputError(f"no draft at {order.draft}: it has neither {DESCRIPTION} nor config.json")
    return AutoModelForCausalLM.from_pretrained(order.draft, dtype=torch.float32).eval(), None


def _copy_tokenizer(target: Path, work: Path) -> Tokenizer:
    source = target / "tokenizer.json"
    if not source.exists():
        raise InputError(f"{target} has no tokenizer.json; save its fast tokenizer there")
    shutil.copyfile(source, work / source.name)
    return Tokenizer.from_file(str(source))


def _architecture(config: PretrainedConfig, context: int | None) -> Architecture:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    limit = context or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise InputError(f"the draft's positions end at {config.max_position_embeddings}; --context {limit} is beyond")
    return Architecture(
        config.model_type,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_key_value_heads,
        head_dim,
        config.vocab_size,
        limit,
    )


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return Vocabulary(len(vocabulary), vocabulary_hash(vocabulary), special)


def _shared(target: Path, plan: DraftPlan | None) -> SharedTensors:
    if plan is None:
        return SharedTensors("standalone", 0, {})
    names = set(plan.shared_tensors(tensor_files(target)).values())
    return describe_shared(read_tensors(target, names), plan)


def _onnx_logits(graph: Path, architecture: Architecture, ids: list[int]) -> np.ndarray:
    """Logits behind every token, one token at a time through the board's own runner: (len(ids), V) float32.

    On the way it rolls back now and then, so that parity covers that too.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    runner: Runner = make_runner(ort.InferenceSession(str(graph), options), architecture)
    rows = []
    for index, token in enumerate(ids):
        if index % 16 == 15:
            runner.append([0, 1, 2])
            runner.truncate(index)
        rows.append(runner.append([token]).copy())
    return np.stack(rows)


@torch.inference_mode()
def _torch_logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def _parity(ours: np.ndarray, theirs: np.ndarray) -> Parity:
    return Parity(
        len(ours),
        round(float(np.mean(ours.argmax(-1) == theirs.argmax(-1))), 4),
        round(float(np.abs(ours - theirs).max()), 6),
    )


def _acceptance(draft: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Share of positions where draft and target choose the same token, by temperature."""
    chooser = Chooser(draft.shape[1])

    def same(temperature: float, position: int) -> bool:
        sampling = Sampling(temperature=temperature, seed=0)
        return (
            chooser.rank(draft[position], sampling, position).ids
            == chooser.rank(target[position], sampling, position).ids
        )

    return {
        f"T={temperature:g}": round(float(np.mean([same(temperature, p) for p in range(len(draft))])), 4)
        for temperature in TEMPERATURES
    }
