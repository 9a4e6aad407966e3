"""Diagnoses whether a target can have a draft, and how large and fast it would be, without loading any weights.

The findings about the target itself are those of `cloud-verifier check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from cloud_verifier.draft_models.layouts import SUPPORTED_MODEL_TYPES, DraftPlan, draft_config, plan_draft
from cloud_verifier.model.converted_checkpoints import resolve_checkpoint
from cloud_verifier.model.inspection import Finding, format_bytes, inspect_target
from cloud_verifier.registry.checkpoint import base_directory, load_config
from cloud_verifier.registry.version_files import find_tensor_files
from device_profiles.comparison import DraftCost, DraftSize
from edge_runtime.planning.board_profile import BoardProfile
from edge_runtime.protocol.errors import InputError, TargetError
from export.evaluate.estimates import EMBEDDING, SizeEstimate, estimate_size

# Chosen: the time that a loaded verifier takes for a token. A slower draft step cannot pay.
SLOW_MILLISECONDS = 80.0
_TYPES = ", ".join(SUPPORTED_MODEL_TYPES)
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
    new_blocks: int = 3
    shared_blocks: int = 0
    weights: str = "int8"
    context: int | None = None
    profiles: tuple[BoardProfile, ...] = ()
    bundle: Path | None = None


def diagnose(query: DraftQuery) -> list[Finding]:
    """Return all findings; checks that a fault makes impossible are skipped.

    Raises:
        InputError: there is no target, or the layout is impossible for any target.
        BundleError: the bundle cannot be read.
    """
    if not query.target.exists():
        raise InputError(f"no target at {query.target}: give the directory of a Hugging Face checkpoint")
    if query.context is not None and query.context < 1:
        raise InputError(f"--context {query.context}: a text has at least 1 token")
    findings = inspect_target(query.target, drafts=[query.bundle] if query.bundle else [])
    if any(finding.subject == "configuration" for finding in findings):
        return findings
    base = base_directory(resolve_checkpoint(query.target))
    config = load_config(base)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        found = f"drafts of {config.model_type} cannot be made"
        advice = f"give a draft of another type with this tokenizer, or choose a target of {_TYPES}"
        return [*findings, Finding("warning", "draft's architecture", found, advice)]
    return [*findings, *_check_head(base, config), *_check_draft(query, config)]


def _check_head(base: Path, config: PretrainedConfig) -> Iterator[Finding]:
    try:
        names = find_tensor_files(base)
    except TargetError:
        return  # reported already
    if "model.embed_tokens.weight" not in names:
        found = f"no model.embed_tokens.weight among {len(names)} tensors"
        yield Finding("fault", "head", found, "save the causal language model itself, not a wrapper around it")
        return
    tied, stored = bool(config.tie_word_embeddings), "lm_head.weight" in names
    if not tied and not stored:
        advice = "set tie_word_embeddings in config.json if the head is the embedding; else copy the checkpoint again"
        yield Finding("fault", "head", "untied in the configuration, but no lm_head.weight is stored", advice)
    elif tied:
        yield Finding("ok", "head", "tied to the embedding: stored once, on the board too")
    else:
        advice = "nothing, or a trimmed head: `draft-export onnx --trim-vocabulary`"
        yield Finding("ok", "head", "untied: the board stores head and embedding", advice)


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
            "fault", "draft's context", f"{context} tokens, but the target's context is {limit}", f"--context {limit}"
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
        f"{format_bytes(size.memory_bytes)}: weights {format_bytes(size.weight_bytes)}, KV cache of {context} tokens "
        f"{format_bytes(context * size.cache_bytes)}, tokenizer {format_bytes(size.tokenizer_bytes)}, the rest for the "
        "process",
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
    kinds = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in size.tensor_bytes.items())
    return f"{format_bytes(size.weight_bytes)} in {weights}, {size.parameters / 1e6:.1f}M parameters: {kinds}"
