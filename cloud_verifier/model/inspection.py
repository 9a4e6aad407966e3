"""Inspects a directory or GGUF file: how it would be served, or why not, with a finding for each thing that matters.

No weights are loaded, nothing is unpickled, and no code of a checkpoint runs. Which tier a model runs on follows from a
model of the same architecture with made-up weights (`model.skeleton`), by the functions that `serve` uses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cloud_verifier.draft_models.layouts import SUPPORTED_MODEL_TYPES
from cloud_verifier.model.converted_checkpoints import resolve_checkpoint
from cloud_verifier.model.general_tier import GeneralRunner
from cloud_verifier.model.pretrained import (
    QUANTIZATION_PACKAGES,
    load_text_config,
    quantization_method,
    usable_context,
)
from cloud_verifier.model.skeleton import build_skeleton
from cloud_verifier.model.target import make_runner
from cloud_verifier.registry.adapter import check_adapter, is_adapter, is_plain_lora
from cloud_verifier.registry.checkpoint import (
    base_directory,
    check_tokenizer,
    load_config,
    load_tokenizer,
    read_end_ids,
)
from cloud_verifier.registry.compatibility import check_compatibility
from cloud_verifier.registry.version_files import find_tensor_files, list_unused_weights
from edge_runtime.common.terminal import new_console
from edge_runtime.protocol.errors import FlexSpecError, TargetError

State = Literal["ok", "warning", "fault"]
STATE_COLORS = {"ok": "green", "warning": "yellow", "fault": "red"}
# A conversation for the chat template, and the answer in it by which the end of a turn is found.
ANSWER = "It is a draft."
CONVERSATION = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": ANSWER}]


class Finding(msgspec.Struct, frozen=True):
    """One finding about a target, or about a draft for it.

    Attributes:
        state: `fault` rules out that it is served, or drafted for.
        subject: what was examined.
        advice: what to do; empty if nothing needs to be done.
        figures: the numbers of `found`, for programs.
    """

    state: State
    subject: str
    found: str
    advice: str = ""
    figures: dict[str, float] = {}


def inspect_target(
    target: Path, *, dtype: str = "float32", context: int | None = None, drafts: Sequence[Path] = ()
) -> list[Finding]:
    """All findings about the target at `target`; checks that a fault makes impossible are skipped.

    Args:
        target: directory of a checkpoint, an adapter or a version stored as changes, or a GGUF file.
        dtype: name of the torch dtype to compute in.
        context: longest text to serve; None for the length that the model was trained for.
        drafts: bundles that are to fit it.

    Raises:
        BundleError: a bundle cannot be read.
    """
    try:
        path = resolve_checkpoint(target).resolve()
        base = base_directory(path)
        config = load_text_config(base)
    except TargetError as error:
        return [_fault("configuration", error)]
    whole = load_config(base).model_type
    part = "" if whole == config.model_type else f", the text part of a {whole} model"
    size = ", ".join(
        f"{getattr(config, name)} {unit}"
        for name, unit in (("num_hidden_layers", "layers"), ("hidden_size", "hidden"))
        if isinstance(getattr(config, name, None), int)
    )
    findings = [Finding("ok", "architecture", f"{config.model_type}{part}, {size}")]
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "weights": lambda: _check_weights(path, base),
        "quantization": lambda: _check_quantization(base),
        "adapter": lambda: _check_adapter(path),
        "context": lambda: _check_context(config, context, path),
        "tier": lambda: _check_tier(base, config, dtype, context, path),
        "tokenizer": lambda: _check_tokenizer(path, base, config),
        "chat template": lambda: _check_chat_template(path, base),
        "draft": lambda: _check_sharing(config),
    }
    for subject, check in checks.items():
        try:
            findings += check()
        except TargetError as error:
            findings.append(_fault(subject, error))
    for draft in drafts:
        findings += _check_bundle(path, draft)
    return findings


def _fault(subject: str, error: FlexSpecError) -> Finding:
    """A fault from an error, whose message ends with what to do."""
    found, _, advice = str(error).rpartition("; ")
    return Finding("fault", subject, found or advice, advice if found else "copy the whole model again")


def _check_weights(path: Path, base: Path) -> Iterator[Finding]:
    unused = [file.name for file in list_unused_weights(path, base)]
    files = find_tensor_files(base)
    paths = set(files.values())
    size = sum(path.stat().st_size for path in paths)
    found = f"{len(files)} tensors in {len(paths)} file{'s' * (len(paths) > 1)}, {format_bytes(size)}"
    yield Finding("ok", "weights", found, figures={"tensors": len(files), "bytes": size})
    if unused:
        rest = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        found = f"{', '.join(map(repr, unused[:3]))}{rest}: never loaded, and not part of the version"
        yield Finding("ok", "other weights", found)


def _check_quantization(base: Path) -> Iterator[Finding]:
    method = quantization_method(load_config(base))
    if not method:
        return
    package, module = QUANTIZATION_PACKAGES.get(method, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        yield Finding("fault", "quantization", f"{method}, which needs the package {package}", f"pip install {package}")
    else:
        yield Finding("ok", "quantization", method)


def _check_adapter(path: Path) -> Iterator[Finding]:
    if not is_adapter(path):
        return
    check_adapter(path)
    if is_plain_lora(path):
        yield Finding("ok", "adapter", "LoRA: merged into its base, or beside others on one base in a registry")
    else:
        yield Finding("ok", "adapter", "merged into its base, of which a registry holds a copy for it")


def _check_context(config: Any, requested: int | None, path: Path) -> Iterator[Finding]:
    context = usable_context(config, requested, path)
    yield Finding("ok", "context", f"{context} tokens", figures={"context": context})


def _check_tier(base: Path, config: Any, dtype: str, requested: int | None, path: Path) -> Iterator[Finding]:
    context = usable_context(config, requested, path)
    skeleton = build_skeleton(base)
    try:
        shape: Any = make_runner(skeleton.model, context, tested=True).shape
        yield Finding("ok", "tier", "fast: sessions are batched over a paged KV cache")
        fixed = 0
    except TargetError as obstacle:
        try:
            shape = GeneralRunner(skeleton.model, context).shape
        except Exception as error:
            raise TargetError(f"transformers does not generate with it: {error}") from None
        advice = "expect one forward per session; the text is the same"
        yield Finding("warning", "tier", f"general: {obstacle}", advice)
        fixed = shape.fixed_bytes
    layers = getattr(config, "num_hidden_layers", 0)
    scale = layers / skeleton.layers if layers and skeleton.layers else 1.0
    item = getattr(torch, dtype).itemsize / torch.float32.itemsize
    per_token, fixed = round(shape.bytes_per_token * scale * item), round(fixed * scale * item)
    whole = f"{per_token * context / 1e9:.3g} GB for {context} tokens"
    also = f", and {format_bytes(fixed)} for each session" if fixed else ""
    found = f"{per_token} bytes per token in {dtype} ({whole}){also}"
    yield Finding("ok", "cache", found, figures={"bytes_per_token": per_token, "bytes_per_session": fixed})


def _check_tokenizer(path: Path, base: Path, config: Any) -> Iterator[Finding]:
    tokenizer = load_tokenizer(path, base)
    check_tokenizer(tokenizer, config.vocab_size, path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    beyond = sum(index >= config.vocab_size for index in vocabulary.values())
    note = f"; {beyond} added tokens have no logit, and are never written" if beyond else ""
    yield Finding("ok", "tokenizer", f"{len(vocabulary)} tokens, {config.vocab_size} logits{note}")
    ends = read_end_ids(base)
    if not ends:
        advice = "set eos_token_id in generation_config.json"
        yield Finding("warning", "end of text", "no end token: every text has its full length", advice)
    else:
        names = ", ".join(f"{tokenizer.id_to_token(index) or 'no token'} ({index})" for index in ends)
        yield Finding("ok", "end of text", names)


def _check_chat_template(path: Path, base: Path) -> Iterator[Finding]:
    directory = next((place for place in (path, base) if (place / "tokenizer.json").exists()), base)
    try:
        make_tokenizer: Any = PreTrainedTokenizerFast
        tokenizer = make_tokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if not tokenizer.chat_template:
            found = "none: conversations are rendered as plain text, and answers end before a line `User:`"
            yield Finding("warning", "chat template", found, "serve the model's instruct version for chats")
            return
        text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split())[:200]
        advice = "copy chat_template.jinja and tokenizer_config.json again"
        yield Finding("warning", "chat template", f"it cannot be rendered: {reason}", advice)
        return
    end = _turn_end(tokenizer.backend_tokenizer, text.rpartition(ANSWER)[2])
    ends = read_end_ids(base)
    if end is not None and end not in ends:
        name = tokenizer.convert_ids_to_tokens(end)
        found = f"it ends an answer with {name}, which is no end token, so that answers run on"
        yield Finding("warning", "chat template", found, f"add {end} to eos_token_id in generation_config.json")
    else:
        yield Finding("ok", "chat template", f"renders; {len(text)} characters for a question and its answer")


def _turn_end(tokenizer: Tokenizer, rest: str) -> int | None:
    """The special token at the beginning of `rest`, which follows an answer."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False).ids
    return ids[0] if ids and ids[0] in special else None


def _check_sharing(config: Any) -> Iterator[Finding]:
    if config.model_type in SUPPORTED_MODEL_TYPES:
        found = "may share embedding, final norm, head and the last blocks (anchor), or the first blocks (prefix)"
        yield Finding("ok", "draft", found)
    else:
        types = ", ".join(SUPPORTED_MODEL_TYPES)
        found = (
            f"shares no tensors: drafts of {config.model_type} are not made; one of another type with this tokenizer"
        )
        yield Finding("ok", "draft", f"{found} fits ({types})")


def _check_bundle(path: Path, draft: Path) -> Iterator[Finding]:
    try:
        (fit,) = check_compatibility(path, [draft]).fits
    except TargetError as error:
        yield _fault("bundle", error)
        return
    if not fit.differences:
        yield Finding("ok", "bundle", f"{draft} fits")
        return
    # One difference of each kind.
    named = list({difference.what: str(difference) for difference in reversed(fit.differences)}.values())
    rest = f", and {len(fit.differences) - len(named)} more" if len(fit.differences) > len(named) else ""
    advice = "give the bundle that was made for this family of targets, or make a draft for it"
    yield Finding("fault", "bundle", f"{draft} does not fit: {', '.join(named)}{rest}", advice)


def format_bytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def print_findings(findings: Sequence[Finding], title: str) -> None:
    """Print a table of the findings on standard output."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "subject", "finding", "advice", title=Text(title), title_justify="left")
    for finding in findings:
        state = Text(finding.state, style=STATE_COLORS[finding.state])
        table.add_row(state, finding.subject, Text(finding.found), Text(finding.advice))
    new_console().print(table)
