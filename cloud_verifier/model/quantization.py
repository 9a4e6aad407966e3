"""Quantization of a loaded model's decoder layers (`--quantize`), as a part of the target's version.

int8 is that of `Int8Linear`, on any device. int4 and fp8 are torchao's, for which a GPU has kernels. It is an extra:
transformers imports it at start wherever it is installed, which takes a while and prints warnings.
"""

from __future__ import annotations

from typing import Any

import torch

from cloud_verifier.model.layer_compilation import decoder_layers
from edge_runtime.protocol.errors import TargetError

# By method: what is quantized. Embedding and head stay as they are.
METHODS = {
    "int8": "weights to 8 bits",
    "int4": "weights to 4 bits, in groups of 128; on a GPU, in bfloat16",
    "fp8": "weights and, row by row, activations to 8-bit floating point; on a GPU",
}
# Inputs of a layer that share a scale in 4 bits. torchao leaves layers alone whose inputs are no multiple of it.
GROUP_SIZE = 128


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are 8-bit integers times a scale for each output.

    Activations are not rounded: the last bit of a sum would become a step, and texts would depend on their batch.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        largest = weight.float().abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scale = largest / 127
        self.register_buffer("weight", torch.round(weight.float() / scale).to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(weight.dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        output = torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype)) * self.scale
        return output if self.bias is None else output + self.bias


def quantize_layers(model: Any, method: str) -> None:
    """Quantize the linear layers of the decoder layers of `model` in place.

    No row of activations shares a scale with another, so that a text does not depend on its batch.

    Raises:
        TargetError: torchao is missing, or the model cannot be quantized on its device.
    """
    layers = decoder_layers(model)
    linear = [part for layer in layers for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    if not linear:
        raise TargetError("it has no list of decoder layers with linear layers, which --quantize is for")
    if method == "int8":
        for layer in layers:
            for module in list(layer.modules()):
                for name, part in list(module.named_children()):
                    if type(part) is torch.nn.Linear:
                        setattr(module, name, Int8Linear(part))
        return
    try:
        from torchao.quantization import quantize_
    except ImportError:
        raise TargetError(f"{method} needs the package torchao: pip install 'flexspec[quantize]'") from None
    before = [part.weight for part in linear]
    try:
        config = _make_config(method, model.device.type)
        for layer in layers:
            quantize_(layer, config)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"torchao cannot quantize it to {method} on {model.device}: {error!r}"[:300]) from None
    left = sum(part.weight is weight for part, weight in zip(linear, before, strict=True))
    if left:
        raise TargetError(
            f"torchao leaves {left} of its {len(linear)} linear layers as they are; choose another method"
        )


def _make_config(method: str, device: str) -> Any:
    from torchao import quantization

    options: Any = quantization
    if device != "cuda":
        raise TargetError(f"{method} is for GPUs; a CPU has int8")
    if method == "int4":
        # The layout of the kernel that PyTorch itself has. `set_inductor_config` would change the whole process.
        layout = {"int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
        return options.Int4WeightOnlyConfig(group_size=GROUP_SIZE, **layout)
    return options.Float8DynamicActivationFloat8WeightConfig(granularity=options.PerRow())
