"""Reads a target's chat format (chat templates, special tokens, sampling defaults) from its Hugging Face files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from jinja2 import TemplateError

from cloud_verifier.registry.tokenizer_config import CONFIG_FILE, read_json_object, read_special_tokens
from edge_runtime.protocol.bundle import CHAT_FILE, ChatFormat, SamplingDefaults
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.jinja_environment import compile_template

GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE, TEMPLATE_DIRECTORY = "chat_template.jinja", "additional_chat_templates"
# Where processors of multimodal models kept the template before transformers 4.50.
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
DEFAULT_TEMPLATE = "default"
# Defaults that change the text and that boards cannot apply, with the value that changes nothing.
UNSUPPORTED_DEFAULTS: dict[str, float] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
}


class TargetChat(NamedTuple):
    """A target's chat format, and the names of its sampling defaults that boards do not support."""

    format: ChatFormat
    unsupported: list[str]


def read_target_chat(directory: Path) -> TargetChat:
    """Read the files of the target in `directory`, with transformers' precedence.

    Raises:
        TargetError: a file does not parse.
        InputError: a template does not parse, or a sampling default is out of range.
    """
    templates = _read_templates(directory)
    for name, source in templates.items():
        try:
            compile_template(source)
        except TemplateError as error:
            raise InputError(f"the chat template {name!r} of {directory} does not parse: {error}; correct it") from None
    generation = read_json_object(directory / GENERATION_FILE)
    unsupported = [
        name for name, neutral in UNSUPPORTED_DEFAULTS.items() if generation.get(name) not in (None, neutral)
    ]
    chat = ChatFormat(templates, read_special_tokens(directory), _read_sampling(generation, directory))
    return TargetChat(chat, unsupported)


def write_chat_format(chat: ChatFormat, bundle: Path) -> None:
    """Write `chat` into a bundle's directory, unless the target says nothing that a board could use."""
    if chat.templates or chat.sampling != SamplingDefaults():
        text = msgspec.json.format(msgspec.json.encode(chat, order="deterministic"), indent=2)
        (bundle / CHAT_FILE).write_bytes(text + b"\n")


def _read_templates(directory: Path) -> dict[str, str]:
    """Return the sources by name: those of template files, else those in the tokenizer's configuration."""
    files = {path.stem: path for path in sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).is_file():
        files[DEFAULT_TEMPLATE] = directory / TEMPLATE_FILE
    if files:
        return {name: _read_source(path) for name, path in files.items()}
    stored = read_json_object(directory / CONFIG_FILE).get("chat_template")
    if stored is None:
        stored = read_json_object(directory / PROCESSOR_TEMPLATE_FILE).get("chat_template")
    if isinstance(stored, str):
        return {DEFAULT_TEMPLATE: stored}
    if isinstance(stored, list):
        stored = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
    if not isinstance(stored, dict):
        return {}
    return {name: source for name, source in stored.items() if isinstance(name, str) and isinstance(source, str)}


def _read_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the chat template {path}: {error}") from None


def _read_sampling(generation: dict[str, Any], directory: Path) -> SamplingDefaults:
    """Return the defaults that the file names, as vLLM does; transformers' own (top-k 50) are not the model's."""
    names = SamplingDefaults.__struct_fields__
    fields = {name: value for name in names if (value := generation.get(name)) is not None}
    if generation.get("do_sample") is False:
        # Without sampling, transformers applies the processors of logits but none of the warpers.
        fields = {"temperature": 0.0} | {n: v for n, v in fields.items() if n == "repetition_penalty"}
    try:
        defaults = msgspec.convert(fields, SamplingDefaults)
        Sampling(**fields)
    except (msgspec.ValidationError, ValueError) as error:
        raise InputError(f"{directory / GENERATION_FILE}: {error}; correct the sampling parameter there") from None
    return defaults
