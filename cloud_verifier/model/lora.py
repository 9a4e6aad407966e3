"""Several LoRA adapters on one base model: each row of a forward goes through its own version's adapter, or none.

The adapters of a layer are concatenated into two matrices. Each row is multiplied by both, and between them the columns
of other adapters are zeroed: two more products of a fixed shape, whatever the mixture of versions in the batch (compare
S-LoRA, arXiv 2311.03285, which gathers instead). The base weights are in memory once.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cloud_verifier.model.attention import get_forward_context
from cloud_verifier.registry.adapter import ADAPTER_WEIGHTS_FILE, LORA_SUFFIXES, TENSOR_PREFIX
from edge_runtime.protocol.errors import TargetError

_DOWN, _UP = LORA_SUFFIXES

# By module name: the matrices (rank, in) and (out, rank), the latter scaled.
LoRAWeights: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LoRAAdapters:
    """The adapters of one model, applied by forward hooks on its linear layers.

    Slots are numbered from 1; slot 0 is the base model alone. Adapters may be added and removed only between forwards.

    The matrices have room for more slots than are in use, so that most adapters come and go in place: whoever holds
    the addresses of the matrices, such as a CUDA graph, is affected only when the room is exhausted or far too large.

    Attributes:
        layout_version: changes whenever the matrices have moved in memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._layers: dict[str, _LoRALayer] = {}
        # Columns of a slot, and slots for which there is room.
        self._rank = self._room = 0
        self.layout_version = 0
        self._slots: dict[int, LoRAWeights] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def load(self, path: Path) -> LoRAWeights:
        """Read the adapter at `path`, for `add`.

        Raises:
            TargetError: it does not fit the model, or cannot be read.
        """
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists
        from peft.utils.other import get_pattern_key

        try:
            config = LoraConfig.from_pretrained(str(path))
            tensors = load_file(path / ADAPTER_WEIGHTS_FILE)
            weights: LoRAWeights = {}
            for name in [name for name in tensors if name.endswith(_DOWN)]:
                module = name.removeprefix(TENSOR_PREFIX).removesuffix(_DOWN)
                down, up = tensors.pop(name), tensors.pop(name.removesuffix(_DOWN) + _UP)
                linear = self._model.get_submodule(module)
                if not isinstance(linear, torch.nn.Linear) or (up.shape[0], down.shape[1]) != linear.weight.shape:
                    raise ValueError(f"{module} has another shape")
                # The rank and its exceptions (rank_pattern) are in the shapes.
                rank, alphas = down.shape[0], config.alpha_pattern or {}
                alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
                scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
                dtype, device = linear.weight.dtype, linear.weight.device
                weights[module] = (down.to(device, dtype), (up.float() * scale).to(device, dtype))
            if tensors or not weights:
                raise ValueError(f"{next(iter(tensors), 'nothing')} is not LoRA on a linear layer")
            targeted = {name for name, _ in self._model.named_modules() if check_target_module_exists(config, name)}
            if targeted != weights.keys():
                raise ValueError(f"its configuration and its tensors disagree about {min(targeted ^ weights.keys())}")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"the adapter at {path} does not fit its base: {error}") from None
        return weights

    def add(self, weights: LoRAWeights) -> int:
        """Add an adapter and return its slot."""
        slot = next(slot for slot in range(1, len(self._slots) + 2) if slot not in self._slots)
        self._slots[slot] = weights
        self._fit(slot)
        return slot

    def remove(self, slot: int) -> None:
        """Remove an adapter that no sequence uses any more."""
        del self._slots[slot]
        self._fit(slot)

    def row_mask(self, slots: torch.Tensor) -> torch.Tensor | None:
        """(rows,) slots -> (rows, columns): 1 for the columns of the row's adapter, else 0. None without adapters."""
        if not self._slots:
            return None
        owners = torch.arange(1, self._room + 1, device=slots.device).repeat_interleave(self._rank)
        dtype: Any = self._model.dtype
        return (slots[:, None] == owners[None, :]).to(dtype)

    def _fit(self, changed: int) -> None:
        """Bring the matrices up to date after a change of slot `changed`: in place, or with another room or rank."""
        matrices = [pair for weights in self._slots.values() for pair in weights.values()]
        rank = max((down.shape[0] for down, _ in matrices), default=0)
        needed = max(self._slots, default=0)
        adapted = {name for weights in self._slots.values() for name in weights}
        fits = rank <= self._rank and needed <= self._room and adapted <= self._layers.keys()
        if fits and needed > self._room // 4:
            for name in self._layers:
                self._write(name, changed)
            return
        self.layout_version += 1
        # The next power of two: as many further adapters as there are, at the price of columns that are zero.
        self._rank, self._room = rank, 1 << (needed - 1).bit_length() if needed else 0
        for name in set(self._layers) - adapted:
            self._layers.pop(name).remove_hook()
        for name in adapted:
            linear: Any = self._model.get_submodule(name)
            if name not in self._layers:
                self._layers[name] = _LoRALayer(linear)
            layer, width = self._layers[name], self._room * self._rank
            options: Any = {"dtype": self._model.dtype, "device": linear.weight.device}
            layer.down = torch.zeros(width, linear.in_features, **options)
            layer.up = torch.zeros(linear.out_features, width, **options)
            for slot in self._slots:
                self._write(name, slot)

    def _write(self, name: str, slot: int) -> None:
        """Write the matrices of one layer and slot: columns (slot - 1) rank to slot rank, zero after its own rank."""
        layer, first = self._layers[name], (slot - 1) * self._rank
        down, up = layer.down[first : first + self._rank], layer.up[:, first : first + self._rank]
        down.zero_()
        up.zero_()
        if own := self._slots.get(slot, {}).get(name):
            rank = own[0].shape[0]
            down[:rank], up[:, :rank] = own


class _LoRALayer:
    """All adapters of one linear layer, as its forward hook."""

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.remove_hook = linear.register_forward_hook(self).remove

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        mask = getattr(get_forward_context(), "lora_mask", None)
        if mask is None:
            return output
        hidden = torch.nn.functional.linear(args[0], self.down) * mask
        return output + torch.nn.functional.linear(hidden, self.up)
