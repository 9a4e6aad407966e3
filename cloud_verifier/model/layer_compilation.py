"""Compilation of a model's layers with torch.compile, once for forwards of any size, kept across restarts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Compile for any number of rows, not for each of a dozen sizes: this takes a fraction of the time, and stays far from
# Dynamo's limit of recompilations. `python -m tests.benchmarks.verifier forwards` compares.
DYNAMIC_ROWS = True
# Options of Inductor beside its defaults, for the same comparison.
INDUCTOR_OPTIONS: dict[str, Any] = {}
# Compiled forms of one layer's code that Dynamo keeps: with and without adapters, and each size if not DYNAMIC_ROWS.
# Beyond its default of 8 it would silently stop compiling.
MAX_COMPILED_FORMS = 64


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers of a transformers model; none if it does not have them in one list."""
    count = model.config.num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    return list(next(lists, ()))


def compile_layers(model: Any, backend: str = "inductor") -> list[torch.nn.Module]:
    """Let each decoder layer of a model be compiled at its first forward; return the layers."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_COMPILED_FORMS)
    layers = decoder_layers(model)
    options: dict[str, Any] = {"options": INDUCTOR_OPTIONS} if INDUCTOR_OPTIONS else {}
    for layer in layers:
        layer.compile(dynamic=DYNAMIC_ROWS, backend=backend, **options)
    return layers


@contextlib.contextmanager
def uncompiled_unless_dynamic() -> Iterator[None]:
    """For forwards of many sizes: run layers as they are if each size would be compiled."""
    with contextlib.nullcontext() if DYNAMIC_ROWS else torch.compiler.set_stance("force_eager"):
        yield


def keep_compiled_code(directory: Path) -> None:
    """Let Inductor and Triton keep what they compile below `directory`, unless the environment names another place."""
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(directory / part))
