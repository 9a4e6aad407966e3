"""LoRA adapters beside one base: every row of a forward goes through its own version's, or none.

All adapters of a layer stand side by side in two matrices. Each row multiplies with both, and what is not its own
adapter's is zeroed between them: two more products of a fixed shape, whatever the mixture of versions (compare S-LoRA,
arXiv 2311.03285, which gathers instead). The base's weights are in memory once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cloud_verifier.model.attention import current
from edge_runtime.protocol.errors import TargetError

# Keys of `adapter_config.json` that must be empty for an adapter to be a sum of plain products.
_PLAIN = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
)
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# By module: (rank, in) and (out, rank), the latter scaled.
Pairs: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]


def is_plain(path: Path) -> bool:
    """Whether the adapter at `path` is LoRA on linear layers and nothing else, so that it need not be merged."""
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and not any(config.get(key) for key in _PLAIN)
        and not config.get("trainable_token_indices")
    )


class Adapters:
    """The adapters of one model, which they are hooked into.

    Slots are counted from 1; 0 is the base alone.

    Attributes:
        arrangement: another number whenever the adapters have moved in memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._banks: dict[str, _Bank] = {}
        self._rank = 0
        self.arrangement = 0
        self._slots: dict[int, Pairs] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def read(self, path: Path) -> Pairs:
        """The adapter at `path`, as `put` takes it.

        Raises:
            TargetError: it does not fit the model, or cannot be read.
        """
        try:
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
            tensors: dict[str, torch.Tensor] = {}
            for file in sorted(path.glob("adapter_model*.safetensors")):
                tensors |= load_file(file)
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            pairs: Pairs = {}
            for name in [name for name in tensors if name.endswith(_DOWN)]:
                module = name.removeprefix(_PREFIX).removesuffix(_DOWN)
                down, up = tensors.pop(name), tensors.pop(name.removesuffix(_DOWN) + _UP)
                linear = self._model.get_submodule(module)
                if not isinstance(linear, torch.nn.Linear) or (up.shape[0], down.shape[1]) != linear.weight.shape:
                    raise ValueError(f"{module} has another shape")
                kind = {"dtype": linear.weight.dtype, "device": linear.weight.device}
                pairs[module] = (down.to(**kind), (up.float() * scale).to(**kind))
            if tensors or not pairs:
                raise ValueError(f"{next(iter(tensors), 'nothing')} is not LoRA on a linear layer")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"the adapter at {path} does not fit its base: {error}") from None
        return pairs

    def put(self, pairs: Pairs) -> int:
        """Puts an adapter beside the others; its slot. Between two forwards only."""
        slot = next(slot for slot in range(1, len(self._slots) + 2) if slot not in self._slots)
        self._slots[slot] = pairs
        self._arrange()
        return slot

    def remove(self, slot: int) -> None:
        """Forgets an adapter that no text goes through any more. Between two forwards only."""
        del self._slots[slot]
        self._arrange()

    def own_columns(self, slots: torch.Tensor) -> torch.Tensor | None:
        """(rows,) slots -> (rows, columns) of what each row leaves between the two products; None without adapters."""
        if not self._slots:
            return None
        owners = torch.arange(1, max(self._slots) + 1, device=slots.device).repeat_interleave(self._rank)
        return (slots[:, None] == owners[None, :]).to(self._model.dtype)

    def _arrange(self) -> None:
        """Puts the adapters of every layer side by side: slot s has columns (s - 1) rank to s rank of both matrices."""
        self.arrangement += 1
        pairs = [pair for modules in self._slots.values() for pair in modules.values()]
        self._rank = max((down.shape[0] for down, _ in pairs), default=0)
        width = max(self._slots, default=0) * self._rank
        touched = {name for modules in self._slots.values() for name in modules}
        for name in set(self._banks) - touched:
            self._banks.pop(name).detach()
        for name in touched:
            linear: Any = self._model.get_submodule(name)
            down, up = (
                linear.weight.new_zeros(width, linear.in_features),
                linear.weight.new_zeros(linear.out_features, width),
            )
            for slot, modules in self._slots.items():
                if name in modules:
                    rank, first = modules[name][0].shape[0], (slot - 1) * self._rank
                    down[first : first + rank], up[:, first : first + rank] = modules[name]
            if name not in self._banks:
                self._banks[name] = _Bank(linear)
            self._banks[name].down, self._banks[name].up = down, up


class _Bank:
    """All adapters of one linear layer."""

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.detach = linear.register_forward_hook(self).remove

    def __call__(self, linear: torch.nn.Module, given: tuple[torch.Tensor, ...], said: torch.Tensor) -> torch.Tensor:
        own = getattr(current(), "own_columns", None)
        if own is None:
            return said
        between = torch.nn.functional.linear(given[0], self.down) * own
        return said + torch.nn.functional.linear(between, self.up)
