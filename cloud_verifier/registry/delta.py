"""A target version that is stored as the tensors in which it differs from its base; perhaps in 8 bits (`compact`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cloud_verifier.registry.int8 import names_of, unpack
from edge_runtime.protocol.errors import TargetError

# The tensors, and which base they belong to: {"format_version": 1, "base": "../target-v1"}.
CHANGED, CHANGES = "changed.safetensors", "changes.json"
FORMAT_VERSION = 1


def base_name(path: Path) -> str:
    """The base that the version at `path` names, relative to it.

    Raises:
        TargetError: `changes.json` does not say.
    """
    note = path / CHANGES
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        version, name = said["format_version"], said["base"]
        path / name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{note} does not name a base: {error!r}") from None
    if version != FORMAT_VERSION:
        raise TargetError(f"{note} has format {version!r}, and this release reads {FORMAT_VERSION}; upgrade flexspec")
    return str(name)


def changed_names(path: Path) -> set[str]:
    """Names of the tensors that the version at `path` brings; none where it is no such version.

    Raises:
        TargetError: the file is damaged.
    """
    if not (path / CHANGES).is_file():
        return set()
    try:
        with safe_open(path / CHANGED, framework="pt") as tensors:
            return names_of(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{path / CHANGED} cannot be read ({error}); copy the version again") from None


def put_changes(model: Any, path: Path) -> None:
    """Puts the tensors at `path` into `model`, in its type.

    Raises:
        TargetError: they do not fit, or cannot be read.
    """
    changed_names(path)
    changed = unpack(load_file(path / CHANGED))
    parameters = dict(model.named_parameters())
    for name, value in changed.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise TargetError(f"{path / CHANGED}: {name} does not fit the base; is changes.json right?")
    with torch.no_grad():
        for name, value in changed.items():
            parameters[name].copy_(value)
