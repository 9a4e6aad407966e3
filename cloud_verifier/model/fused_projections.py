"""Linear layers with the same input, such as those of queries, keys and values, computed as one product on a GPU.

Each product of a few rows takes a few microseconds beside the time to read its weights, and a small matrix does not
occupy the GPU: on an H200, three products of 4096 x 4096 take 37 us for 8 rows, and one of 12288 x 4096 takes 28.

No list names the layers. A short forward shows which layers of one module are given the same tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from cloud_verifier.model.quantization import Fp8Linear, Int8Linear

# Layers whose tensors all have the outputs as their first dimension, so that several make one.
FUSIBLE_LAYERS = (torch.nn.Linear, Int8Linear, Fp8Linear)
# Tokens of the forward that shows which layers have the same input. Chosen: enough for any mask.
PROBE_TOKENS = 4


class FusedProjections(torch.nn.Module):
    """Several linear layers as one, and its outputs until each layer has taken its own.

    Attributes:
        whole: the layer that computes the outputs of all. Their own tensors are views of its tensors.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.whole = _concatenate(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def output_of(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out) of one layer. Nothing is kept once all layers have been asked with one input."""
        if self._input is not inputs or index not in self._outputs:
            self._input = inputs
            self._outputs = dict(enumerate(torch.split(self.whole(inputs), self._sizes, -1)))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class FusedPart(torch.nn.Module):
    """What makes a linear layer a part of `FusedProjections`: its class becomes a subclass of this and of its own.

    Attributes:
        part: the fused layers, and which of them it is. In a tuple, so that they do not become a submodule.
    """

    part: tuple[FusedProjections, int]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        fused, index = self.part
        return fused.output_of(index, inputs)


@functools.cache
def _part_class(layer_class: Any) -> Any:
    return type(f"Fused{layer_class.__name__}", (FusedPart, layer_class), {})


class ProjectionFusion:
    """The fused linear layers of one model."""

    def __init__(self, model: Any) -> None:
        """Fuse those layers of `model` that are given the same tensor, as far as they are plain."""
        # By group: the parent, the name of its fused layers, and the layers.
        self._groups: list[tuple[torch.nn.Module, str, list[Any]]] = []
        for parent, names in _layers_with_one_input(model):
            layers = [getattr(parent, name) for name in names]
            fused = FusedProjections(layers)
            for index, layer in enumerate(layers):
                layer_class: Any = type(layer)
                layer.__class__ = _part_class(layer_class)
                layer.part = (fused, index)
            name = "fused_" + "_".join(names)
            parent.add_module(name, fused)
            self._groups.append((parent, name, layers))

    def undo(self) -> bool:
        """Let each layer compute its own outputs again; return whether some were fused."""
        groups, self._groups = self._groups, []
        for parent, name, layers in groups:
            delattr(parent, name)
            for layer in layers:
                layer.__class__ = type(layer).__mro__[2]
                del layer.part
        return bool(groups)


def _concatenate(layers: list[Any]) -> torch.nn.Module:
    """One layer with the outputs of all, whose tensors the layers' own become views of."""
    first = layers[0]
    layer_class: Any = type(first)
    whole = layer_class.__new__(layer_class)
    torch.nn.Module.__init__(whole)
    whole.in_features, whole.out_features = first.in_features, sum(layer.out_features for layer in layers)
    whole.bias = None
    for kind in ("_parameters", "_buffers"):
        for name, value in vars(first)[kind].items():
            if value is None or not value.ndim:
                vars(whole)[kind][name] = value
                continue
            tensor = torch.cat([getattr(layer, name).detach() for layer in layers])
            parts = torch.split(tensor, [layer.out_features for layer in layers])
            for owner, part in zip([whole, *layers], [tensor, *parts], strict=True):
                own = torch.nn.Parameter(part, requires_grad=False) if kind == "_parameters" else part
                vars(owner).pop(name, None)
                vars(owner)[kind][name] = own
    return whole  # type: ignore[no-any-return]


@torch.inference_mode()
def _layers_with_one_input(model: Any) -> list[tuple[torch.nn.Module, list[str]]]:
    """Names of those linear layers, by their parent, that a forward gives one tensor after the other."""
    candidates = _plain_layers(model)
    with _recorded_inputs(list(candidates)) as calls:
        ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.vocab_size
        model(input_ids=ids, use_cache=False)
    groups: list[list[Any]] = []
    previous: torch.Tensor | None = None
    for layer, inputs in calls:
        if groups and inputs is previous and _fits(layer, groups[-1], candidates):
            groups[-1].append(layer)
        else:
            groups.append([layer])
        previous = inputs
    called = [layer for layer, _ in calls]
    return [
        (candidates[group[0]][0], [candidates[layer][1] for layer in group])
        for group in groups
        # A layer that is called twice has several inputs.
        if len(group) > 1 and all(called.count(layer) == 1 for layer in group)
    ]


def _fits(layer: Any, group: list[Any], candidates: dict[Any, tuple[torch.nn.Module, str]]) -> bool:
    """Whether `layer` can be computed with those of `group`."""

    def form(each: Any) -> tuple[object, ...]:
        return candidates[each][0], type(each), each.weight.dtype, each.in_features, each.bias is None

    return layer not in group and form(layer) == form(group[0])


def _plain_layers(model: Any) -> dict[Any, tuple[torch.nn.Module, str]]:
    """The linear layers that compute nothing else and share no tensor, with their parents and names."""
    tensors = [id(value) for module in model.modules() for value in module._parameters.values()]
    return {
        layer: (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) in FUSIBLE_LAYERS
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        # Neither quantized by a package, nor a shard.
        and type(layer.weight.data) is torch.Tensor
        and tensors.count(id(layer.weight)) <= 1
    }


@contextlib.contextmanager
def _recorded_inputs(layers: list[Any]) -> Iterator[list[tuple[Any, torch.Tensor]]]:
    """Record which layer is called with which tensor."""
    calls: list[tuple[Any, torch.Tensor]] = []

    def record(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        calls.append((layer, args[0]))

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
