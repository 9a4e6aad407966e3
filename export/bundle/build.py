"""Builds a bundle from a draft checkpoint: graph, tokenizer, manifest, and the measurements recorded in it.

A bundle is a function of its inputs: the same configuration, files and tool versions give the same bytes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cloud_verifier.acceptance.measure import TEMPERATURES, choose_tokens, count_accepted
from cloud_verifier.draft_models.checkpoint import DESCRIPTION_FILE, load_draft, read_description
from cloud_verifier.draft_models.layouts import DraftPlan, fingerprint_shared
from cloud_verifier.draft_models.safetensors_io import read_tensors
from cloud_verifier.registry.version_files import find_tensor_files
from edge_runtime.draft import OnnxRunner, make_runner
from edge_runtime.protocol.bundle import (
    FORMAT_VERSION,
    Architecture,
    Manifest,
    OnnxGraph,
    Parity,
    SharedTensors,
    Vocabulary,
    hash_vocabulary,
    record_file,
    write_manifest,
)
from edge_runtime.protocol.errors import DraftError, InputError
from edge_runtime.protocol.sampling import Sampling
from export.bundle.chat_format import read_target_chat, write_chat_format
from export.bundle.onnx_graph import GRAPH_FILE, check_variant, export_graph
from export.bundle.vocab_trim import select_head_ids
from export.common.atomic import new_directory

# Packages whose version can change the bytes of a bundle; recorded in the manifest.
MAKERS = ("flexspec", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "optimum")
TOKENIZER_FILE = "tokenizer.json"
HEAD_FILE = "head_ids.npy"
BUILD_STEPS = ("draft", "graph", "parity", "acceptance", "manifest")
# Logit of the ids that a trimmed head lacks: never chosen, but finite, so that scores stay finite.
ABSENT_LOGIT = np.float32(-1e30)
# Parity covers rollback: before every 16th position these ids are decoded and rolled back.
ROLLBACK_INTERVAL, ROLLED_BACK_IDS = 16, [0, 1, 2]
# Before its weights are rounded, a graph must choose PyTorch's argmax at this share of the first positions. float32 has
# near ties too: plain models measure 100 %, one with a wrong RoPE 20 to 84 %.
MIN_FLOAT_AGREEMENT, CHECKED_POSITIONS = 0.99, 256
# Rows of a trimmed head that are widened to the whole vocabulary at once. Chosen: 131 MB for 128k ids.
WIDENED_ROWS = 256

StepCallback = Callable[[str], None]
Rows = npt.NDArray[np.float32]
HeadIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class BundleConfig:
    """What to build.

    Attributes:
        target: directory of the target that the draft was trained for. Without `acceptance` only its configuration, its
            tokenizer and the tensors that the draft shares are needed.
        draft: directory of the draft's own tensors (see `draft_models.checkpoint`), or of a whole Hugging Face model,
            which is then a standalone draft.
        kind, weights: see `export.bundle.onnx_graph`.
        text: text on which parity and acceptance are measured. A text longer than the context of draft or target is
            split into pieces.
        context: longest text of the draft in tokens; None for the model's.
        positions: number of positions of the text that are measured.
        acceptance: measure acceptance, which loads the whole target.
        head_text: trim the head to the ids of this text (see `export.bundle.vocab_trim`); None keeps the whole head.
        head_size: keep at most this many of them, the most frequent ones.
    """

    target: Path
    draft: Path
    kind: str
    weights: str
    text: str
    _: KW_ONLY
    context: int | None = None
    positions: int = 2000
    acceptance: bool = True
    head_text: str | None = None
    head_size: int | None = None


class ReferenceDraft:
    """A draft in PyTorch, with which its graphs are compared; loaded once for any number of bundles.

    Attributes:
        draft: the model, in float32 on the CPU.
        plan: its layout; None for a standalone draft.
        architecture: its architecture, with the context that was asked for.
        tokenizer: the target's tokenizer.
        pieces: ids of the text to measure on; each piece fits the context of draft and target.
    """

    def __init__(self, config: BundleConfig) -> None:
        """Load the draft. Raises InputError, DraftError and TargetError if target or draft cannot be used."""
        # `make_bundle` reports its own progress. transformers' stubs miss the annotations of this function.
        logging_options: Any = transformers.utils.logging
        logging_options.disable_progress_bar()
        self._target = config.target
        self.draft, self.plan = _load_draft(config)
        self.architecture = _read_architecture(self.draft.config, config.context)
        tokenizer_path = config.target / TOKENIZER_FILE
        if not tokenizer_path.exists():
            raise InputError(f"{config.target} has no {TOKENIZER_FILE}; save its fast tokenizer there")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_path))
        target_context = AutoConfig.from_pretrained(config.target).max_position_embeddings
        ids: list[int] = self.tokenizer.encode(config.text).ids[: config.positions]
        if len(ids) < 2:
            raise InputError("the text to measure on is too short; give a longer one with --text")
        size = min(self.architecture.context, target_context)
        self.pieces = [ids[start : start + size] for start in range(0, len(ids), size)]

    @functools.cached_property
    def logits(self) -> Rows:
        """The draft's logits after every token: (positions, V)."""
        return _torch_logits(self.draft, self.pieces)

    @functools.cached_property
    def target_logits(self) -> Rows:
        """The target's logits after every token: (positions, V). Loads the target."""
        return _torch_logits(_load_model(self._target), self.pieces)

    @functools.cached_property
    def shared(self) -> SharedTensors:
        """The tensors that the draft shares with the target."""
        if self.plan is None:
            return SharedTensors("standalone", 0, {})
        names = set(self.plan.shared_tensors(find_tensor_files(self._target)).values())
        return fingerprint_shared(read_tensors(self._target, names), self.plan)


def make_bundle(
    config: BundleConfig, output: Path, on_step: StepCallback, reference: ReferenceDraft | None = None
) -> Manifest:
    """Build a bundle at `output`, which must not exist; it appears there complete or not at all.

    The same configuration gives the same bytes. On another kind of processor the last digit of the measured figures may
    differ.

    Args:
        on_step: called with the name of each of BUILD_STEPS before the step.
        reference: the draft of this configuration, if it is loaded already.

    Raises:
        DraftError: the exported graph computes another function than the draft.
        FlexSpecError: target or draft cannot be used, `output` exists, or the disk is full.
    """
    check_variant(config.kind, config.weights)
    with new_directory(output) as work:
        on_step("draft")
        reference = reference or ReferenceDraft(config)
        architecture = reference.architecture
        _write_tokenizer(config.target / TOKENIZER_FILE, work / TOKENIZER_FILE)
        write_chat_format(read_target_chat(config.target).format, work)
        head = None
        if config.head_text is not None:
            head = select_head_ids(
                reference.tokenizer, config.head_text, architecture.vocabulary_size, config.head_size
            )
            np.save(work / HEAD_FILE, head)
        on_step("graph")
        export_graph(
            reference.draft,
            work,
            config.kind,
            config.weights,
            head=head,
            context=architecture.context,
            check=functools.partial(_check_float_graph, reference),
        )
        on_step("parity")
        logits = _onnx_logits(work / GRAPH_FILE, architecture, reference.pieces)
        parity = _measure_parity(logits, reference.logits if head is None else reference.logits[:, head])
        on_step("acceptance")
        acceptance = _measure_acceptance(logits, reference.target_logits, head) if config.acceptance else {}
        on_step("manifest")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=output.name,
            architecture=architecture,
            vocabulary=_describe_vocabulary(reference.tokenizer),
            shared=reference.shared,
            graph=OnnxGraph(GRAPH_FILE, config.kind, config.weights, "" if head is None else HEAD_FILE),
            parity=parity,
            files={path.name: record_file(path) for path in sorted(work.iterdir())},
            acceptance=acceptance,
            made={name: importlib.metadata.version(name) for name in MAKERS},
        )
        write_manifest(work, manifest)
    return manifest


def _load_draft(config: BundleConfig) -> tuple[PreTrainedModel, DraftPlan | None]:
    if (config.draft / DESCRIPTION_FILE).exists():
        return load_draft(config.draft, config.target), read_description(config.draft).plan
    if not (config.draft / "config.json").exists():
        raise InputError(f"no draft at {config.draft}: it has neither {DESCRIPTION_FILE} nor config.json")
    return _load_model(config.draft), None


def _load_model(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
    model.train(False)
    return model


def _read_architecture(config: PretrainedConfig, context: int | None) -> Architecture:
    limit = context or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise InputError(f"the draft's positions end at {config.max_position_embeddings}; --context {limit} is beyond")
    return Architecture(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary_size=config.vocab_size,
        context=limit,
    )


def _describe_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return Vocabulary(len(vocabulary), hash_vocabulary(vocabulary), special)


def _write_tokenizer(source: Path, destination: Path) -> None:
    """Copy a tokenizer without the white space of its JSON, which is half of the file."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {source}: {error}") from None
    destination.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _check_float_graph(reference: ReferenceDraft, graph: Path) -> None:
    """Raise DraftError if the float32 graph computes another function than the draft in PyTorch."""
    left, pieces = CHECKED_POSITIONS, []
    for piece in reference.pieces:
        pieces.append(piece[:left])
        left -= len(pieces[-1])
        if not left:
            break
    logits = _onnx_logits(graph, reference.architecture, pieces)
    agreement = _measure_parity(logits, _torch_logits(reference.draft, pieces)).greedy_agreement
    if agreement < MIN_FLOAT_AGREEMENT:
        raise DraftError(
            f"the exported graph of this {reference.architecture.model_type} agrees with PyTorch at only "
            f"{agreement:.1%} of {len(logits)} positions in float32, so the exporter does not express it: use another "
            "--graph, or another draft"
        )


def _onnx_logits(graph: Path, architecture: Architecture, pieces: list[list[int]]) -> Rows:
    """Logits after every token, one token at a time on the board's own runner: (positions, V) float32."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options)
    rows = []
    for ids in pieces:
        runner: OnnxRunner = make_runner(session, architecture)
        for index, token in enumerate(ids):
            fits = index + len(ROLLED_BACK_IDS) <= architecture.context
            if index % ROLLBACK_INTERVAL == ROLLBACK_INTERVAL - 1 and fits:
                runner.append(ROLLED_BACK_IDS)
                runner.truncate(index)
            rows.append(runner.append([token]).copy())
    return np.stack(rows)


@torch.inference_mode()
def _torch_logits(model: PreTrainedModel, pieces: list[list[int]]) -> Rows:
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy() for ids in pieces]
    return np.concatenate(rows)


def _measure_parity(exported: Rows, reference: Rows) -> Parity:
    # Row by row: of 128k logits, thousands of rows are gigabytes.
    difference = max(float(np.abs(a - b).max()) for a, b in zip(exported, reference, strict=True))
    return Parity(
        positions=len(exported),
        greedy_agreement=round(float(np.mean(exported.argmax(-1) == reference.argmax(-1))), 4),
        max_logit_difference=float(f"{difference:.2g}"),
    )


def _measure_acceptance(draft: Rows, target: Rows, head: HeadIds | None) -> dict[str, float]:
    """Acceptance rate by temperature. Row i is sampled as position i with seed 0.

    Args:
        head: the ids of the draft's logits; None for all, in order.
    """
    positions = list(range(len(draft)))
    acceptance = {}
    for temperature in TEMPERATURES:
        sampling = Sampling(temperature=temperature, seed=0)
        drafted: list[int] = []
        for start in range(0, len(draft), WIDENED_ROWS):
            rows = torch.from_numpy(_widen(draft[start : start + WIDENED_ROWS], head, target.shape[1]))
            drafted += choose_tokens(rows, [(sampling, positions[start : start + WIDENED_ROWS])])
        chosen = choose_tokens(torch.from_numpy(target), [(sampling, positions)])
        accepted, total = count_accepted(drafted, chosen)
        acceptance[f"T={temperature:g}"] = round(accepted / total, 4)
    return acceptance


def _widen(rows: Rows, head: HeadIds | None, vocabulary_size: int) -> Rows:
    """Logits over the whole vocabulary; ids that the draft lacks get ABSENT_LOGIT."""
    widened = np.full((len(rows), vocabulary_size), ABSENT_LOGIT, np.float32)
    columns: slice | HeadIds = slice(None, rows.shape[1]) if head is None else head
    widened[:, columns] = rows
    return widened
