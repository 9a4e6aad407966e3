"""A model of a checkpoint's architecture with made-up weights, which shows how the checkpoint runs without loading it.

Its text is meaningless; masks, positions and caches are those of the real model. Equal shapes share one weight. A large
model is cut down to a few layers that include every kind of layer, with narrow feed-forward parts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]

from cloud_verifier.draft_models.checkpoint import no_init_weights
from cloud_verifier.model.pretrained import auto_class, check_parameter_count, text_part
from cloud_verifier.registry.checkpoint import load_config
from edge_runtime.protocol.errors import TargetError

# Spread of the made-up weights. Chosen: that of most architectures' initialization.
SPREAD = 0.02
# Larger models are cut down. Chosen: the forwards of a smaller one take seconds on a CPU.
LARGE_PARAMETERS = 300_000_000
# Layers of a model that is cut down, or more if it has further kinds. Chosen: two periods of common hybrids.
FEW_LAYERS = 8
# Sizes that neither masks nor caches depend on, and the largest values of a model that is cut down.
NARROW_SIZES = {
    "intermediate_size": 256, "moe_intermediate_size": 64, "ffn_dim": 256, "n_inner": 256, "num_experts": 16,
    "num_local_experts": 16,
}  # fmt: skip
FEW_TOKENS = 2048


class Skeleton(NamedTuple):
    """The model that `build_skeleton` builds.

    Attributes:
        model: the text part of the model.
        layers: number of its layers; those of the checkpoint unless it was cut down.
    """

    model: Any
    layers: int


def build_skeleton(base: Path) -> Skeleton:
    """Build the text part of the model of the checkpoint at `base`, in float32 on the CPU, without its weights.

    Raises:
        TargetError: transformers cannot build the model.
    """
    config = load_config(base)
    # Quantized layers would need their packages, and run as others do.
    for settings in (config, config.get_text_config(decoder=True)):
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
    try:
        model = _empty_model(config, base)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters > LARGE_PARAMETERS:
            check_parameter_count(parameters, base)
            model = _empty_model(_cut_down(config), base)
        _fill(model)
        layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        return Skeleton(text_part(model.eval()), layers)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"transformers cannot build the model of {base}: {error!r}"[:300]) from None


def _empty_model(config: Any, base: Path) -> Any:
    auto = auto_class(config, base)
    # As in from_pretrained: a class may be that of the text part alone.
    model_class = auto._model_mapping[type(config)]
    part = config if isinstance(config, model_class.config_class) else config.get_text_config(decoder=True)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return auto.from_config(part, dtype=torch.float32)


def _cut_down(config: Any) -> Any:
    """A smaller configuration with every kind of layer of `config`."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for name, size in NARROW_SIZES.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > size:
            setattr(text, name, size)
    if text.vocab_size > FEW_TOKENS and text is config:
        text.vocab_size, text.pad_token_id = FEW_TOKENS, None
    layers = getattr(text, "num_hidden_layers", 0)
    # Layers that use the keys of others are counted from the end.
    if layers <= FEW_LAYERS or getattr(text, "num_kv_shared_layers", 0):
        return config
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list | tuple | str) and len(value) == layers
    }
    few = max([FEW_LAYERS, *(max(value.index(kind) for kind in value) + 1 for value in lists.values())])
    for name, value in lists.items():
        setattr(text, name, value[:few])
    text.num_hidden_layers = few
    return config


@torch.no_grad()
def _fill(model: Any) -> None:
    """Give the parameters of `model`, which have no memory, values."""
    generator = torch.Generator().manual_seed(0)
    made_up: dict[torch.Size, torch.Tensor] = {}
    tied: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape = parameter.shape
            if shape not in made_up:
                made_up[shape] = torch.empty(shape).normal_(std=SPREAD, generator=generator)
                if len(shape) < 2:
                    # Norms, and the vectors of recurrent layers.
                    made_up[shape] += 1
            if id(parameter) not in tied:
                tied[id(parameter)] = torch.nn.Parameter(made_up[shape], requires_grad=False)
            module._parameters[name] = tied[id(parameter)]
    model.tie_weights()
