"""A target version that is stored as the tensors in which it differs from its base, optionally in 8 bits (`int8`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cloud_verifier.registry.int8 import tensor_names, unpack
from edge_runtime.protocol.errors import TargetError

CHANGED_TENSORS_FILE = "changed.safetensors"
# Names the base: {"format_version": 1, "base": "../target-v1"}.
CHANGES_FILE = "changes.json"
FORMAT_VERSION = 1


def read_base_name(path: Path) -> str:
    """The base that the version at `path` names, relative to it.

    Raises:
        TargetError: `changes.json` names no base, or has another format.
    """
    file = path / CHANGES_FILE
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        version, name = contents["format_version"], contents["base"]
        path / name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{file} does not name a base: {error!r}") from None
    if version != FORMAT_VERSION:
        raise TargetError(f"{file} has format {version!r}, and this release reads {FORMAT_VERSION}; upgrade flexspec")
    return str(name)


def changed_tensor_names(path: Path) -> set[str]:
    """Names of the tensors that the version at `path` changes; none if it is not stored as changes.

    Raises:
        TargetError: the file is damaged.
    """
    if not (path / CHANGES_FILE).is_file():
        return set()
    try:
        with safe_open(path / CHANGED_TENSORS_FILE, framework="pt") as tensors:
            return tensor_names(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{path / CHANGED_TENSORS_FILE} cannot be read ({error}); copy the version again") from None


def apply_changes(model: Any, path: Path) -> None:
    """Copy the changed tensors at `path` into `model`, in its dtype.

    Raises:
        TargetError: they do not fit, or cannot be read.
    """
    changed_tensor_names(path)  # Reports a damaged file.
    changed = unpack(load_file(path / CHANGED_TENSORS_FILE))
    parameters = dict(model.named_parameters())
    for name, value in changed.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise TargetError(f"{path / CHANGED_TENSORS_FILE}: {name} does not fit the base; is changes.json right?")
    with torch.no_grad():
        for name, value in changed.items():
            parameters[name].copy_(value)
