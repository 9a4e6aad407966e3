"""What can be said of a target's draft before it is made: from configuration, tokenizer and tensor names alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from cloud_verifier.draft_models.layouts import FAMILIES, DraftPlan, draft_config, plan_draft
from cloud_verifier.draft_models.safetensors_io import tensor_files
from cloud_verifier.model.rollback import forgetless_layers, sliding_window
from cloud_verifier.model.target import base_of, tokenizer_of
from device_profiles.comparison import Cost, Draft
from edge_runtime.planning.board_profile import Profile
from edge_runtime.protocol.bundle import read_bundle, vocabulary_hash
from edge_runtime.protocol.errors import InputError, TargetError
from export.evaluate.estimates import EMBEDDING, Estimate, estimate

State = Literal["ok", "warning", "fault"]
# Slower than this, a step of the draft is longer than most verifiers take for a token.
SLOW_MILLISECONDS = 80.0
# More than a board of 8 GB should give to a draft.
LARGE_BYTES = 4e9


@dataclass(frozen=True)
class Question:
    """Which draft of which target, for whom.

    Attributes:
        target: directory of a checkpoint, or of a version of one.
        layout, new_blocks, shared_blocks: see `cloud_verifier.draft_models.layouts`.
        weights: `int4` or `int8`.
        context: longest text of the draft; None for the target's.
        profiles: boards.
        bundle: a draft that is there already.
    """

    target: Path
    layout: str = "anchor"
    new_blocks: int = 2
    shared_blocks: int = 1
    weights: str = "int8"
    context: int | None = None
    profiles: tuple[Profile, ...] = ()
    bundle: Path | None = None


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        state: whether it is in the way.
        subject: what was looked at.
        found: what it is like.
        advice: what to do; empty where nothing needs doing.
        figures: what `found` says in numbers, for programs.
    """

    state: State
    subject: str
    found: str
    advice: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def examine(question: Question) -> list[Finding]:
    """All findings; what cannot be looked at because of a fault is left out.

    Raises:
        InputError: there is no target there, or the layout is impossible whatever the target.
        BundleError: the bundle cannot be read.
    """
    if not question.target.is_dir():
        raise InputError(f"no target at {question.target}: give the directory of a Hugging Face checkpoint")
    if question.context is not None and question.context < 1:
        raise InputError(f"--context {question.context}: a text has at least 1 token")
    base = base_of(question.target)
    config = _config(base)
    if isinstance(config, Finding):
        return [config]
    findings = [_architecture(config), *_rollback(config), *_checkpoint(base, config)]
    findings += _tokenizer(question, base, config)
    if config.model_type in FAMILIES:
        findings += _draft(question, config)
    return findings


def _config(base: Path) -> PretrainedConfig | Finding:
    if not (base / "config.json").is_file():
        return Finding("fault", "configuration", f"{base} has no config.json", "copy the whole checkpoint")
    try:
        return AutoConfig.from_pretrained(base)
    except Exception as error:  # transformers raises whatever it meets
        # Its message for unknown types goes on with advice for other people.
        why = str(error).splitlines()[0]
        advice = f"choose a target of {', '.join(FAMILIES)}, or copy the checkpoint again"
        return Finding(
            "fault", "configuration", f"{base / 'config.json'} is not one that transformers knows: {why}", advice
        )


def _architecture(config: PretrainedConfig) -> Finding:
    if config.model_type in FAMILIES:
        found = f"{config.model_type}, {config.num_hidden_layers} blocks of {config.hidden_size}"
        return Finding("ok", "architecture", found)
    return Finding(
        "fault", "architecture", f"{config.model_type} is not supported", f"choose a target of {', '.join(FAMILIES)}"
    )


def _rollback(config: PretrainedConfig) -> Iterator[Finding]:
    strange, window = forgetless_layers(config), sliding_window(config)
    limit = getattr(config, "max_position_embeddings", None)
    if strange:
        yield Finding(
            "fault",
            "roll-back",
            f"layers of type {', '.join(strange)} cannot take rejected tokens back",
            "choose a target with plain attention",
        )
    elif window and limit and window < limit:
        yield Finding(
            "warning",
            "roll-back",
            f"a sliding window of {window} tokens, shorter than the context of {limit}",
            f"serve it with --max-context {window}, and give the draft --context {window}: within that, it rolls back",
            {"window": window, "context": limit},
        )
    else:
        yield Finding("ok", "roll-back", "plain keys and values, so rejected tokens can be taken back")


def _checkpoint(base: Path, config: PretrainedConfig) -> Iterator[Finding]:
    try:
        names = tensor_files(base)
    except TargetError as error:
        yield Finding("fault", "weights", str(error), "save the model with safe_serialization=True, or copy it again")
        return
    missing = sorted({path.name for path in names.values() if not path.is_file()})
    if missing:
        found = f"the index names {len(missing)} files that are not there, {missing[0]} the first"
        yield Finding("fault", "weights", found, "copy the checkpoint again")
        return
    if config.model_type in FAMILIES and "model.embed_tokens.weight" not in names:
        found = f"no model.embed_tokens.weight among {len(names)} tensors"
        yield Finding("fault", "weights", found, "save the causal language model itself, not a wrapper around it")
        return
    yield Finding("ok", "weights", f"{len(names)} tensors in {len(set(names.values()))} files")
    tied, stored = bool(config.tie_word_embeddings), "lm_head.weight" in names
    if not tied and not stored:
        advice = "set tie_word_embeddings in config.json if the head is the embedding; else copy the checkpoint again"
        yield Finding("fault", "head", "untied by the configuration, and no lm_head.weight is stored", advice)
    elif tied:
        yield Finding("ok", "head", "tied to the embedding: stored once, on the board too")
    else:
        advice = "nothing, or a trimmed head: `draft-export onnx --trim-vocabulary`"
        yield Finding("ok", "head", "untied: the board holds head and embedding", advice)


def _tokenizer(question: Question, base: Path, config: PretrainedConfig) -> Iterator[Finding]:
    try:
        vocabulary = tokenizer_of(question.target, base).get_vocab(with_added_tokens=True)
    except TargetError as error:
        yield Finding("fault", "tokenizer", str(error), "save its fast tokenizer there: tokenizer.save_pretrained(...)")
        return
    highest = max(vocabulary.values(), default=0)
    # Configurations of several models in one, such as those that see, have no such figure of their own.
    logits = getattr(config, "vocab_size", None)
    if logits is not None and highest >= logits:
        found = f"it has the id {highest}, and the model only {logits} logits"
        yield Finding("fault", "tokenizer", found, "copy model and tokenizer again from one place")
    else:
        yield Finding("ok", "tokenizer", f"{len(vocabulary)} tokens, {logits or 'unknown'} logits")
    if question.bundle is None:
        return
    manifest = read_bundle(question.bundle, verify=False).manifest
    if manifest.vocabulary.hash == vocabulary_hash(vocabulary):
        yield Finding("ok", "bundle", f"{question.bundle} has the same tokenizer")
    else:
        yield Finding(
            "fault",
            "bundle",
            f"the tokenizer of {question.bundle} is another one ({manifest.vocabulary.size} tokens, not "
            f"{len(vocabulary)})",
            "give the bundle that was made for this family of targets, or make a draft for it",
        )


def _draft(question: Question, config: PretrainedConfig) -> Iterator[Finding]:
    """Size and speed of the draft that would be made."""
    try:
        plan = plan_draft(config, question.layout, new_blocks=question.new_blocks, shared_blocks=question.shared_blocks)
    except InputError as error:
        yield Finding("fault", "layout", str(error), "change --layout, --new-blocks or --shared-blocks")
        return
    yield Finding("ok", "layout", _described(plan))
    limit = config.max_position_embeddings
    context = question.context or limit
    if context > limit:
        yield Finding("fault", "context", f"{context} tokens, and the target's end at {limit}", f"--context {limit}")
        return
    small = draft_config(config, plan)
    size = estimate(small, question.weights, context)
    large = size.memory_bytes > LARGE_BYTES
    advice = "--weights int4, a shorter --context, or fewer blocks" if large else ""
    state: State = "warning" if large else "ok"
    yield Finding("ok", "size on disk", _sizes(size, question.weights), "", _bytes(size))
    yield Finding(
        state,
        "memory on the board",
        f"{_megabytes(size.memory_bytes)}: weights {_megabytes(size.weight_bytes)}, "
        f"{context} tokens of cache {_megabytes(context * size.cache_bytes)}, the process itself the rest",
        advice,
        {"memory_bytes": size.memory_bytes, "cache_bytes_per_token": size.cache_bytes, "context": context},
    )
    # A board reads one row of an embedding, not the table; where it is the head as well, it reads that.
    for profile in question.profiles:
        yield _speed(profile, size, question)


def _speed(profile: Profile, size: Estimate, question: Question) -> Finding:
    read = size.weight_bytes - size.tensor_bytes.get(EMBEDDING, 0)
    cost = Cost.of(profile, Draft("draft", read, size.cache_bytes), 0)
    full = Cost.of(profile, Draft("draft", read, size.cache_bytes), size.context)
    slow = cost.milliseconds_per_token > SLOW_MILLISECONDS
    return Finding(
        "warning" if slow else "ok",
        f"speed, {profile.name}",
        f"{cost.milliseconds_per_token:.3g} ms per drafted token, {full.milliseconds_per_token:.3g} behind "
        f"{size.context} tokens ({cost.basis})",
        "slower than most verifiers' own tokens: int4, fewer blocks, a trimmed head, or another board" if slow else "",
        {"milliseconds": cost.milliseconds_per_token, "milliseconds_at_full_context": full.milliseconds_per_token},
    )


def _described(plan: DraftPlan) -> str:
    shared = f", then {plan.shared_blocks} of the target's own" if plan.shared_blocks else ""
    if plan.layout == "prefix":
        return f"prefix: {plan.shared_blocks} of the target's own blocks, then {plan.new_blocks} new ones"
    return f"{plan.layout}: {plan.new_blocks} new blocks{shared}"


def _sizes(size: Estimate, weights: str) -> str:
    kinds = ", ".join(f"{kind} {_megabytes(count)}" for kind, count in size.tensor_bytes.items())
    return f"{_megabytes(size.weight_bytes)} in {weights}, {size.parameters / 1e6:.1f}M parameters: {kinds}"


def _bytes(size: Estimate) -> dict[str, float]:
    return {"weight_bytes": size.weight_bytes, "parameters": size.parameters, **size.tensor_bytes}


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
