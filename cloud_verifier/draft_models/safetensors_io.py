"""Reads tensors of safetensors checkpoints in the Hugging Face layout: one file, or shards and an index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cloud_verifier.registry.version_files import find_tensor_files
from edge_runtime.protocol.errors import TargetError


def read_tensors(directory: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read only the named tensors, in their stored dtype, on the CPU.

    Raises:
        TargetError: the checkpoint lacks one of them or cannot be read.
    """
    files = find_tensor_files(directory)
    names_by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        if name not in files:
            raise TargetError(f"{directory} has no tensor {name!r}: it is not the kind of target that is expected")
        names_by_file[files[name]].append(name)
    tensors = {}
    for path, names_in_file in names_by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in names_in_file})
        except (FileNotFoundError, SafetensorError) as error:
            raise TargetError(f"{path} cannot be read ({error}): copy the checkpoint again") from None
    return tensors
