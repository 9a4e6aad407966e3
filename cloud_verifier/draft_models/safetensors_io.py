"""Safetensors checkpoints in the Hugging Face layout: one file, or shards and an index."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from cloud_verifier.registry.version_files import find_tensor_files
from edge_runtime.protocol.errors import TargetError

# Chosen below the 16 MB that many hosts and proxies allow per file.
SHARD_SIZE = "15MB"


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


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Save weights as bfloat16 shards, configuration and generation settings; converts `model` to bfloat16.

    The configuration is written so that transformers 4 and 5, and tools that know neither, read the same model:
    release 5 nests the rotary base and renames the dtype.
    """
    module: Any = model  # transformers wraps `to` without its signature.
    module.to(torch.bfloat16).save_pretrained(directory, max_shard_size=SHARD_SIZE)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        # A plain rotary embedding is fully described by its base; any other kind keeps its description.
        if rope.get("rope_type", "default") == "default":
            del config["rope_parameters"]
    config["torch_dtype"] = config["dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
