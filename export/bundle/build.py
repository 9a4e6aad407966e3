"""From a draft checkpoint to a bundle: graph, tokenizer, manifest, and the measurements that go into it."""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from cloud_verifier.draft_models.checkpoint import DESCRIPTION, load_draft, read_description
from cloud_verifier.draft_models.layouts import DraftPlan, describe_shared
from cloud_verifier.draft_models.safetensors_io import read_tensors, tensor_files
from edge_runtime.draft.onnx_runner import Runner, make_runner
from edge_runtime.protocol.bundle import (
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
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Chooser, Sampling
from export.bundle.onnx_graph import GRAPH_FILE, check_form, export_graph
from export.bundle.vocab_trim import ids_of_text
from export.common.atomic import new_directory

# Packages whose release can change the bytes of a bundle.
MAKERS = ("flexspec", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "optimum")
TEMPERATURES = (0.0, 0.7, 1.0)
TOKENIZER = "tokenizer.json"
HEAD_FILE = "head_ids.npy"
# No token of a trimmed head's draft, but a number: scores must stay finite.
NEVER = np.float32(-1e30)

Report = Callable[[str], None]
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BundleOrder:
    """What to make.

    Attributes:
        target: directory of the target that the draft was trained for. Without `acceptance` only its configuration,
            its tokenizer and the tensors that the draft shares are needed.
        draft: directory of the draft's own tensors (see `draft_models.checkpoint`), or of a whole Hugging Face model, which is
            then a standalone draft.
        kind, weights: see `export.bundle.onnx_graph`.
        text: what parity and acceptance are measured on; where it is longer than what draft and target can read at
            once, in pieces.
        context: longest text of the draft in tokens; None for the model's.
        positions: how many positions of the text.
        acceptance: measure it, which takes the whole target.
        head_text: trim the head to the ids of this text (see `export.bundle.vocab_trim`); None leaves it whole.
        head_size: and to so many of them, the most frequent.
    """

    target: Path
    draft: Path
    kind: str
    weights: str
    text: str
    context: int | None = None
    positions: int = 2000
    acceptance: bool = True
    head_text: str | None = None
    head_size: int | None = None


class Original:
    """A draft in PyTorch, and what its graphs are compared with: loaded once, for any number of bundles.

    Attributes:
        draft: in float32, on the CPU.
        plan: its layout; None for a standalone draft.
        architecture: of the draft, with the context that was ordered.
        tokenizer: the target's.
        pieces: ids of the text to measure on, each within the context.
    """

    def __init__(self, order: BundleOrder) -> None:
        """Raises InputError, DraftError and TargetError where target or draft cannot be used."""
        # The progress that people see is ours.
        disable_progress_bar()
        self._target = order.target
        self.draft, self.plan = _load(order)
        self.architecture = _architecture(self.draft.config, order.context)
        source = order.target / TOKENIZER
        if not source.exists():
            raise InputError(f"{order.target} has no {TOKENIZER}; save its fast tokenizer there")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(source))
        most = AutoConfig.from_pretrained(order.target).max_position_embeddings
        ids: list[int] = self.tokenizer.encode(order.text).ids[: order.positions]
        if len(ids) < 2:
            raise InputError("the text to measure on is too short; give a longer one with --text")
        size = min(self.architecture.context, most)
        self.pieces = [ids[start : start + size] for start in range(0, len(ids), size)]

    @functools.cached_property
    def logits(self) -> Rows:
        """Of the draft, behind every token: (positions, V)."""
        return _torch_logits(self.draft, self.pieces)

    @functools.cached_property
    def target_logits(self) -> Rows:
        """Of the target, which is loaded for it: (positions, V)."""
        target = AutoModelForCausalLM.from_pretrained(self._target, dtype=torch.float32).eval()
        return _torch_logits(target, self.pieces)

    @functools.cached_property
    def shared(self) -> SharedTensors:
        """What the draft shares with the target."""
        return _shared(self._target, self.plan)


def make_bundle(order: BundleOrder, output: Path, report: Report, original: Original | None = None) -> Manifest:
    """Makes a bundle at `output`, which must not exist; it appears there whole or not at all.

    The same order gives the same bytes; on another kind of processor the measured figures may differ in the last digit.

    Args:
        report: called with what comes next, once per step of `STEPS`.
        original: of this order, where it is loaded already.

    Raises:
        FlexSpecError: target or draft cannot be used, `output` exists, or the disk is full.
    """
    check_form(order.kind, order.weights)
    with new_directory(output) as work:
        report("draft")
        original = original or Original(order)
        tokenizer, architecture = original.tokenizer, original.architecture
        shutil.copyfile(order.target / TOKENIZER, work / TOKENIZER)
        head = None
        if order.head_text is not None:
            head = ids_of_text(tokenizer, order.head_text, architecture.vocabulary_size, order.head_size)
            np.save(work / HEAD_FILE, head)
        report("graph")
        export_graph(original.draft, work, order.kind, order.weights, head=head, context=original.architecture.context)
        report("parity")
        logits = _onnx_logits(work / GRAPH_FILE, architecture, original.pieces)
        wanted = original.logits
        parity = _parity(logits, wanted if head is None else wanted[:, head])
        report("acceptance")
        acceptance = _acceptance(logits, original.target_logits, head) if order.acceptance else {}
        report("manifest")
        manifest = Manifest(
            FORMAT_VERSION,
            output.name,
            architecture,
            _vocabulary(tokenizer),
            original.shared,
            Graph(GRAPH_FILE, order.kind, order.weights, "" if head is None else HEAD_FILE),
            parity,
            {path.name: record_file(path) for path in sorted(work.iterdir())},
            acceptance,
            {name: importlib.metadata.version(name) for name in MAKERS},
        )
        write_manifest(work, manifest)
    return manifest


STEPS = ("draft", "graph", "parity", "acceptance", "manifest")


def _load(order: BundleOrder) -> tuple[PreTrainedModel, DraftPlan | None]:
    if (order.draft / DESCRIPTION).exists():
        return load_draft(order.draft, order.target), read_description(order.draft).plan
    if not (order.draft / "config.json").exists():
        raise InputError(f"no draft at {order.draft}: it has neither {DESCRIPTION} nor config.json")
    return AutoModelForCausalLM.from_pretrained(order.draft, dtype=torch.float32).eval(), None


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


def _onnx_logits(graph: Path, architecture: Architecture, pieces: list[list[int]]) -> Rows:
    """Logits behind every token, one token at a time through the board's own runner: (positions, V) float32.

    On the way it rolls back now and then, so that parity covers that too.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options)
    rows = []
    for ids in pieces:
        runner: Runner = make_runner(session, architecture)
        for index, token in enumerate(ids):
            if index % 16 == 15 and index + 3 <= architecture.context:
                runner.append([0, 1, 2])
                runner.truncate(index)
            rows.append(runner.append([token]).copy())
    return np.stack(rows)


@torch.inference_mode()
def _torch_logits(model: PreTrainedModel, pieces: list[list[int]]) -> Rows:
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy() for ids in pieces]
    return np.concatenate(rows)


def _parity(ours: Rows, theirs: Rows) -> Parity:
    return Parity(
        len(ours),
        round(float(np.mean(ours.argmax(-1) == theirs.argmax(-1))), 4),
        # Row by row: of 128k logits, thousands of rows are gigabytes.
        float(f"{max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)):.2g}"),
    )


def _acceptance(draft: Rows, target: Rows, head: npt.NDArray[np.int32] | None) -> dict[str, float]:
    """Share of positions where draft and target choose the same token, by temperature.

    Args:
        head: the ids of the draft's logits; None for all, in order.
    """
    chooser = Chooser(target.shape[1])
    whole = np.full(target.shape[1], NEVER)
    columns: slice | npt.NDArray[np.int32] = slice(None, draft.shape[1]) if head is None else head

    def same(temperature: float, position: int) -> bool:
        sampling = Sampling(temperature=temperature, seed=0)
        whole[columns] = draft[position]
        return chooser.rank(whole, sampling, position).ids == chooser.rank(target[position], sampling, position).ids

    return {
        f"T={temperature:g}": round(float(np.mean([same(temperature, p) for p in range(len(draft))])), 4)
        for temperature in TEMPERATURES
    }
