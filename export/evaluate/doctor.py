"""Diagnoses whether a target can have a draft, and how large and fast it would be, without reading any weights.

Only the target's configuration, its tokenizer, and the names and shapes of its tensors are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from cloud_verifier.draft_models.layouts import SUPPORTED_MODEL_TYPES, DraftPlan, draft_config, plan_draft
from cloud_verifier.model.rollback import layers_without_rollback, sliding_window
from cloud_verifier.registry.checkpoint import base_directory, find_tensor_files, load_tokenizer
from device_profiles.comparison import DraftCost, DraftSize
from edge_runtime.planning.board_profile import BoardProfile
from edge_runtime.protocol.bundle import hash_vocabulary, read_bundle
from edge_runtime.protocol.errors import InputError, TargetError
from export.evaluate.estimates import EMBEDDING, SizeEstimate, estimate_size

State = Literal["ok", "warning", "fault"]
# Chosen: the time that a loaded verifier takes for a token. A slower draft step cannot pay.
SLOW_MILLISECONDS = 80.0
# Chosen: half the memory of a board with 8 GB.
LARGE_BYTES = 4e9


@dataclass(frozen=True)
class DraftQuery:
    """The draft to diagnose.

    Attributes:
        target: directory of a checkpoint, or of a version of one.
        layout, new_blocks, shared_blocks: see `cloud_verifier.draft_models.layouts`.
        weights: `int4` or `int8`.
        context: longest text of the draft; None for the target's.
        profiles: boards to model the speed on.
        bundle: an existing draft to check against the target.
    """

    target: Path
    layout: str = "anchor"
    new_blocks: int = 2
    shared_blocks: int = 1
    weights: str = "int8"
    context: int | None = None
    profiles: tuple[BoardProfile, ...] = ()
    bundle: Path | None = None


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        state: `fault` rules a draft out.
        subject: what was examined.
        found: the result.
        advice: what to do; empty if nothing needs to be done.
        figures: the numbers of `found`, for programs.
    """

    state: State
    subject: str
    found: str
    advice: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The finding as plain data."""
        return asdict(self)


def diagnose(query: DraftQuery) -> list[Finding]:
    """Return all findings; checks that a fault makes impossible are skipped.

    Raises:
        InputError: there is no target, or the layout is impossible for any target.
        BundleError: the bundle cannot be read.
    """
    if not query.target.is_dir():
        raise InputError(f"no target at {query.target}: give the directory of a Hugging Face checkpoint")
    if query.context is not None and query.context < 1:
        raise InputError(f"--context {query.context}: a text has at least 1 token")
    base = base_directory(query.target)
    config = _load_config(base)
    if isinstance(config, Finding):
        return [config]
    findings = [_check_architecture(config), *_check_rollback(config), *_check_checkpoint(base, config)]
    findings += _check_tokenizer(query, base, config)
    if config.model_type in SUPPORTED_MODEL_TYPES:
        findings += _check_draft(query, config)
    return findings


def _load_config(base: Path) -> PretrainedConfig | Finding:
    if not (base / "config.json").is_file():
        return Finding("fault", "configuration", f"{base} has no config.json", "copy the whole checkpoint")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base)
    except Exception as error:  # transformers raises exceptions of many kinds
        # For unknown types, the lines after the first are advice for developers of transformers.
        reason = str(error).splitlines()[0]
        advice = f"choose a target of {', '.join(SUPPORTED_MODEL_TYPES)}, or copy the checkpoint again"
        return Finding(
            "fault", "configuration", f"{base / 'config.json'} is not one that transformers knows: {reason}", advice
        )
    return config


def _check_architecture(config: PretrainedConfig) -> Finding:
    if config.model_type in SUPPORTED_MODEL_TYPES:
        found = f"{config.model_type}, {config.num_hidden_layers} blocks of {config.hidden_size}"
        return Finding("ok", "architecture", found)
    return Finding(
        "fault",
        "architecture",
        f"{config.model_type} is not supported",
        f"choose a target of {', '.join(SUPPORTED_MODEL_TYPES)}",
    )


def _check_rollback(config: PretrainedConfig) -> Iterator[Finding]:
    unsupported, window = layers_without_rollback(config), sliding_window(config)
    limit = getattr(config, "max_position_embeddings", None)
    if unsupported:
        yield Finding(
            "fault",
            "roll-back",
            f"layers of type {', '.join(unsupported)} cannot roll back rejected tokens",
            "choose a target with plain attention",
        )
    elif window and limit and window < limit:
        yield Finding(
            "warning",
            "roll-back",
            f"a sliding window of {window} tokens, shorter than the context of {limit}",
            f"serve it with --max-context {window}, and give the draft --context {window}: within the window it can "
            "roll back",
            {"window": window, "context": limit},
        )
    else:
        yield Finding("ok", "roll-back", "plain keys and values, so rejected tokens can be rolled back")


def _check_checkpoint(base: Path, config: PretrainedConfig) -> Iterator[Finding]:
    try:
        names = find_tensor_files(base)
    except TargetError as error:
        yield Finding("fault", "weights", str(error), "save the model with safe_serialization=True, or copy it again")
        return
    missing = sorted({path.name for path in names.values() if not path.is_file()})
    if missing:
        found = f"the index names {len(missing)} files that do not exist, the first is {missing[0]}"
        yield Finding("fault", "weights", found, "copy the checkpoint again")
        return
    if config.model_type in SUPPORTED_MODEL_TYPES and "model.embed_tokens.weight" not in names:
        found = f"no model.embed_tokens.weight among {len(names)} tensors"
        yield Finding("fault", "weights", found, "save the causal language model itself, not a wrapper around it")
        return
    yield Finding("ok", "weights", f"{len(names)} tensors in {len(set(names.values()))} files")
    tied, stored = bool(config.tie_word_embeddings), "lm_head.weight" in names
    if not tied and not stored:
        advice = "set tie_word_embeddings in config.json if the head is the embedding; else copy the checkpoint again"
        yield Finding("fault", "head", "untied in the configuration, but no lm_head.weight is stored", advice)
    elif tied:
        yield Finding("ok", "head", "tied to the embedding: stored once, on the board too")
    else:
        advice = "nothing, or a trimmed head: `draft-export onnx --trim-vocabulary`"
        yield Finding("ok", "head", "untied: the board stores head and embedding", advice)


def _check_tokenizer(query: DraftQuery, base: Path, config: PretrainedConfig) -> Iterator[Finding]:
    try:
        vocabulary = load_tokenizer(query.target, base).get_vocab(with_added_tokens=True)
    except TargetError as error:
        yield Finding("fault", "tokenizer", str(error), "save its fast tokenizer there: tokenizer.save_pretrained(...)")
        return
    highest = max(vocabulary.values(), default=0)
    # Configurations that contain several models, such as vision models, have no vocab_size of their own.
    logits = getattr(config, "vocab_size", None)
    if logits is not None and highest >= logits:
        found = f"it has the id {highest}, but the model has only {logits} logits"
        yield Finding("fault", "tokenizer", found, "copy model and tokenizer again from the same source")
    else:
        yield Finding("ok", "tokenizer", f"{len(vocabulary)} tokens, {logits or 'unknown'} logits")
    if query.bundle is None:
        return
    manifest = read_bundle(query.bundle, verify=False).manifest
    if manifest.vocabulary.hash == hash_vocabulary(vocabulary):
        yield Finding("ok", "bundle", f"{query.bundle} has the same tokenizer")
    else:
        yield Finding(
            "fault",
            "bundle",
            f"the tokenizer of {query.bundle} is another one ({manifest.vocabulary.size} tokens, not "
            f"{len(vocabulary)})",
            "give the bundle that was made for this family of targets, or make a draft for it",
        )


def _check_draft(query: DraftQuery, config: PretrainedConfig) -> Iterator[Finding]:
    """Size and speed of the draft."""
    try:
        plan = plan_draft(config, query.layout, new_blocks=query.new_blocks, shared_blocks=query.shared_blocks)
    except InputError as error:
        yield Finding("fault", "layout", str(error), "change --layout, --new-blocks or --shared-blocks")
        return
    yield Finding("ok", "layout", _describe_plan(plan))
    limit = config.max_position_embeddings
    context = query.context or limit
    if context > limit:
        yield Finding(
            "fault", "context", f"{context} tokens, but the target's context is {limit}", f"--context {limit}"
        )
        return
    size = estimate_size(draft_config(config, plan), query.weights, context)
    yield Finding(
        "ok",
        "size on disk",
        _describe_size(size, query.weights),
        figures={"weight_bytes": size.weight_bytes, "parameters": size.parameters, **size.tensor_bytes},
    )
    large = size.memory_bytes > LARGE_BYTES
    yield Finding(
        "warning" if large else "ok",
        "memory on the board",
        f"{_format_bytes(size.memory_bytes)}: weights {_format_bytes(size.weight_bytes)}, KV cache of {context} tokens "
        f"{_format_bytes(context * size.cache_bytes)}, the rest for the process",
        "--weights int4, a shorter --context, or fewer blocks" if large else "",
        {"memory_bytes": size.memory_bytes, "cache_bytes_per_token": size.cache_bytes, "context": context},
    )
    for profile in query.profiles:
        yield _model_speed(profile, size)


def _model_speed(profile: BoardProfile, size: SizeEstimate) -> Finding:
    # A decode step reads one row of an untied embedding; a tied one is also the head, which is read whole.
    read = size.weight_bytes - size.tensor_bytes.get(EMBEDDING, 0)
    cost = DraftCost.estimate(profile, DraftSize("draft", read, size.cache_bytes), 0)
    full = DraftCost.estimate(profile, DraftSize("draft", read, size.cache_bytes), size.context)
    slow = cost.milliseconds_per_token > SLOW_MILLISECONDS
    return Finding(
        "warning" if slow else "ok",
        f"speed, {profile.name}",
        f"{cost.milliseconds_per_token:.3g} ms per drafted token, {full.milliseconds_per_token:.3g} after "
        f"{size.context} tokens ({cost.basis})",
        "slower than most verifiers decode: use int4, fewer blocks, a trimmed head, or another board" if slow else "",
        {"milliseconds": cost.milliseconds_per_token, "milliseconds_at_full_context": full.milliseconds_per_token},
    )


def _describe_plan(plan: DraftPlan) -> str:
    if plan.layout == "prefix":
        return f"prefix: {plan.shared_blocks} of the target's own blocks, then {plan.new_blocks} new ones"
    shared = f", then {plan.shared_blocks} of the target's own" if plan.shared_blocks else ""
    return f"{plan.layout}: {plan.new_blocks} new blocks{shared}"


def _describe_size(size: SizeEstimate, weights: str) -> str:
    kinds = ", ".join(f"{kind} {_format_bytes(count)}" for kind, count in size.tensor_bytes.items())
    return f"{_format_bytes(size.weight_bytes)} in {weights}, {size.parameters / 1e6:.1f}M parameters: {kinds}"


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
