"""A PEFT adapter on disk: its configuration, and whether it can be applied exactly. No model is loaded.

Settings are allowed, not forbidden: an adapter with a setting or a value that is not listed here is refused, since it
may change what the adapter does in a way that would otherwise be missed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edge_runtime.protocol.errors import TargetError

ADAPTER_CONFIG_FILE = "adapter_config.json"
# The only file of weights that peft reads.
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# Prefix of the names in that file: that of the wrapper that peft puts around a model.
TENSOR_PREFIX = "base_model.model."
# Endings of the names of LoRA on linear layers.
LORA_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
# The number of a block in a name. A name without one is of the head or the embedding, and one with two is of an expert:
# layers that do not see all rows of a forward, so that their adapters have to be merged.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")

# Kinds of adapters that peft merges into a base.
MERGEABLE_TYPES = ("LORA", "IA3", "LOHA", "LOKR")
# Settings of LoRA that only matter in training, or that follow from the tensors; any value is right.
_IRRELEVANT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "runtime_config",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
# Settings that `model.lora` applies beside other adapters of a base; any value is right.
_APPLIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Ways to initialize LoRA that leave the base as it is, and those that change it, always in the same way.
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_MERGED_INITIALIZATIONS = ("pissa", "olora")
# Settings with which peft can merge an adapter, but which are more than a sum of matrix products.
_MERGED = {
    "use_dora", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
    "target_parameters", "ensure_weight_tying",
}  # fmt: skip


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The configuration of the adapter at `path`. Raises TargetError."""
    file = path / ADAPTER_CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file} cannot be read ({error}); copy the adapter again") from None
    if not isinstance(config, dict):
        raise TargetError(f"{file} is not the configuration of an adapter; copy the adapter again")
    return config


def is_adapter(path: Path) -> bool:
    """Whether the version at `path` is a PEFT adapter."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def is_plain_lora(path: Path) -> bool:
    """Whether the version at `path` is LoRA on linear layers of blocks and nothing else, so that it need not be merged.

    Raises:
        TargetError: it is an adapter that cannot be applied exactly.
    """
    if not is_adapter(path) or _merged_settings(path):
        return False
    return all(name.endswith(LORA_SUFFIXES) and len(_INDEX.findall(name)) == 1 for name in adapter_tensor_names(path))


def check_adapter(path: Path) -> None:
    """Check that the adapter at `path` can be applied exactly, as far as its configuration tells.

    Raises:
        TargetError: it cannot, or one of its files is missing.
    """
    _merged_settings(path)
    adapter_tensor_names(path)


def _merged_settings(path: Path) -> list[str]:
    """The settings because of which the adapter at `path` has to be merged into its base. Raises TargetError."""
    config = read_adapter_config(path)
    kind = config.get("peft_type")
    if kind not in MERGEABLE_TYPES:
        raise TargetError(
            f"the adapter at {path} is of the type {kind!r}, which cannot be merged into a base exactly; supported are "
            f"{', '.join(MERGEABLE_TYPES)}"
        )
    if kind != "LORA":
        return ["peft_type"]
    merged = []
    for name, value in config.items():
        neutral = not value or (name, value) == ("bias", "none")
        if name == "init_lora_weights":
            if value in _PLAIN_INITIALIZATIONS:
                continue
            if value not in _MERGED_INITIALIZATIONS:
                raise TargetError(
                    f"the adapter at {path} has {name}={value!r}, which changed its base when it was made and cannot "
                    "be repeated exactly; save it with path_initial_model_for_weight_conversion, as plain LoRA"
                )
            merged.append(name)
        elif name in _MERGED:
            merged += [] if neutral else [name]
        elif name not in _IRRELEVANT | _APPLIED and not neutral:
            raise TargetError(
                f"the adapter at {path} sets {name} to {str(value)[:60]}, which is not supported; merge it into its "
                "base with peft, and serve the result"
            )
    return merged


def adapter_tensor_names(path: Path) -> set[str]:
    """Names of the adapter's own tensors, each starting with the name of the module it changes; none if no adapter.

    Raises:
        TargetError: they are missing or damaged.
    """
    if not is_adapter(path):
        return set()
    file = path / ADAPTER_WEIGHTS_FILE
    if not file.exists():
        raise TargetError(f"{path} has no {file.name}; save the adapter again with safe_serialization=True")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name.removeprefix(TENSOR_PREFIX) for name in tensors.keys()}  # noqa: SIM118 - no iterator
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{file} is damaged or truncated ({error}); copy the adapter again") from None
