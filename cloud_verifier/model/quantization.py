"""Quantization of a loaded model's decoder layers (`--quantize`), as a part of the target's version.

int8 and fp8 are our own few lines. int4 is torchao's, an extra: transformers imports it at start wherever it is
installed, which takes a while and prints warnings. On an H200 only fp8's products take less time than bfloat16's (see
tests/benchmarks/README.md); int8 and int4 save memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from cloud_verifier.model.layer_compilation import decoder_layers
from edge_runtime.protocol.errors import TargetError

# By method: what is quantized. Embedding and head stay as they are.
METHODS = {
    "int8": "weights to 8 bits",
    "int4": "weights to 4 bits, in groups of 128; on a GPU, in bfloat16",
    "fp8": "weights and, row by row, activations to 8-bit floating point; on a GPU, in bfloat16",
}
# Inputs of a layer that share a scale in 4 bits. torchao leaves layers alone whose inputs are no multiple of it.
GROUP_SIZE = 128
# Rows of smaller values than this become zero. Chosen: far from what float32 can divide by.
LEAST_VALUE = 1e-12


# Rows of the check of fp8 products, and their largest error as a share of the largest product. Chosen: a number of e4m3
# has an error of at most 6 %, and those of a row's numbers mostly cancel.
TESTED_ROWS, PRODUCT_TOLERANCE = 7, 0.1


class QuantizedLinear(torch.nn.Module):
    """A linear layer whose weights are small numbers times a scale for each output.

    Attributes:
        weight: (out, in) in the small format.
        scale: (out,) in the dtype of the layer.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    # The small format, and its largest number.
    FORMAT: torch.dtype
    LARGEST: float

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        scale = _row_scale(weight.float(), self.LARGEST)
        self.register_buffer("weight", self.rounded(weight.float() / scale))
        self.register_buffer("scale", scale[:, 0].to(weight.dtype))

    @classmethod
    def rounded(cls, values: torch.Tensor) -> torch.Tensor:
        return values.to(cls.FORMAT)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), with weights converted to the dtype of the inputs, which are not rounded."""
        output = torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype)) * self.scale
        return output if self.bias is None else output + self.bias


class Int8Linear(QuantizedLinear):
    """Weights of 8-bit integers.

    Activations are not rounded: the last bit of a sum would become a step, and texts would depend on their batch.
    """

    FORMAT, LARGEST = torch.int8, 127

    @classmethod
    def rounded(cls, values: torch.Tensor) -> torch.Tensor:
        return torch.round(values).to(cls.FORMAT)


class Fp8Linear(QuantizedLinear):
    """Weights and activations of 8-bit floating point (e4m3), the latter with a scale for each row; on a GPU.

    The product has no scales of its own: the GPU's kernels for products with scales by row and column are slower.
    """

    one: torch.Tensor
    FORMAT, LARGEST = torch.float8_e4m3fn, 448
    # Of all layers; see `unrounded_inputs`.
    rounds_inputs = True
    # The product takes a multiple of so many rows.
    ROWS = 16

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("one", torch.ones((), device=linear.weight.device))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if not Fp8Linear.rounds_inputs:
            return super().forward(inputs)
        rows = inputs.flatten(0, -2).float()
        scale = _row_scale(rows, self.LARGEST)
        small = torch.nn.functional.pad((rows / scale).to(self.FORMAT), (0, 0, 0, -rows.shape[0] % self.ROWS))
        product = torch._scaled_mm(small, self.weight.t(), scale_a=self.one, scale_b=self.one, out_dtype=inputs.dtype)
        scaled = (product[: rows.shape[0]].float() * scale * self.scale).to(inputs.dtype)
        output = scaled.view(*inputs.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


@contextlib.contextmanager
def unrounded_inputs() -> Iterator[None]:
    """Let fp8 layers round their weights only, so that forwards can be compared.

    Rounding makes steps of last bits: after some layers, two correct forwards of one text are far apart. For all models
    of the process: to be used before any is served.
    """
    before, Fp8Linear.rounds_inputs = Fp8Linear.rounds_inputs, False
    try:
        yield
    finally:
        Fp8Linear.rounds_inputs = before


def _check_products(layers: list[torch.nn.Module]) -> None:
    """Compare the products of fp8 numbers with those of unrounded inputs, for each size of a layer.

    The self-test compares forwards with unrounded inputs only.

    Raises:
        TargetError: they differ by more than rounding.
    """
    sizes = {(part.in_features, part.out_features): part for part in layers if isinstance(part, Fp8Linear)}
    for part in sizes.values():
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(TESTED_ROWS, part.in_features, generator=generator).to(part.scale)
        with torch.inference_mode():
            rounded = part(inputs)
            with unrounded_inputs():
                expected = part(inputs)
        error = (rounded - expected).abs().max() / expected.abs().max()
        # Also if it is not a number.
        if not error <= PRODUCT_TOLERANCE:
            raise TargetError(f"products of fp8 numbers are wrong on {part.scale.device}, by {float(error):.0%}")


def _row_scale(values: torch.Tensor, largest: float) -> torch.Tensor:
    """(rows, 1): what the rows of (rows, in) float32 are divided by, so that their largest value is `largest`."""
    return values.abs().amax(1, keepdim=True).clamp(min=LEAST_VALUE) / largest


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
    if method == "fp8":
        _check_device(model, method)
        if model.dtype == torch.float16:
            raise TargetError("the products of fp8 numbers exceed float16; use --dtype bfloat16")
    if quantized := {"int8": Int8Linear, "fp8": Fp8Linear}.get(method):
        for layer in layers:
            for module in list(layer.modules()):
                for name, part in list(module.named_children()):
                    if type(part) is torch.nn.Linear:
                        setattr(module, name, quantized(part))
        _check_products([part for layer in layers for part in layer.modules()])
        return
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError:
        raise TargetError(f"{method} needs the package torchao: pip install 'flexspec[quantize]'") from None
    _check_device(model, method)
    before = [part.weight for part in linear]
    try:
        # The layout of the kernel that PyTorch itself has. `set_inductor_config` would change the whole process.
        layout = {"int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
        config = Int4WeightOnlyConfig(group_size=GROUP_SIZE, **layout)
        for layer in layers:
            quantize_(layer, config)
    except Exception as error:
        raise TargetError(f"torchao cannot quantize it to {method} on {model.device}: {error!r}"[:300]) from None
    left = sum(part.weight is weight for part, weight in zip(linear, before, strict=True))
    if left:
        raise TargetError(
            f"torchao leaves {left} of its {len(linear)} linear layers as they are; choose another method"
        )


def _check_device(model: Any, method: str) -> None:
    if model.device.type != "cuda":
        raise TargetError(f"{method} is for GPUs; a CPU has int8")
