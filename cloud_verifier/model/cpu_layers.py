"""Layers of transformers' models for forwards on a CPU: packed weights, and decoder layers of a few fused operators.

A forward of a few rows takes as long as its weights take to read. PyTorch's own matrix products read them at half that
speed or less for 1 to 8 rows, and with a kernel that depends on the number of rows. oneDNN's, on weights that are
packed once at load, come near it from 4 rows on, and in float32 the result of a row does not depend on the other rows,
not even in the last bit. A forward of fewer rows is therefore padded to `MIN_ROWS`. In bfloat16, a processor with
matrix units (Intel's AMX) gives other last bits for 3 to 32 rows: there, as with PyTorch's own products, a row depends
on the others without `--exact`.

Milliseconds of all matrices of SmolLM2-135M in float32 (one thread of an AMD EPYC with AVX-512; reading them once takes
26), by rows: 1: 48 by `torch.nn.functional.linear`, 45 packed; 2: 89, 50; 3: 110, 39; 4: 73, 37; 6: 76, 37; 8: 80, 47.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import rms_norm, silu

from cloud_verifier.model.attention import attend, get_forward_context
from cloud_verifier.model.torchscript import scripted

log = logging.getLogger(__name__)

# Kernels that oneDNN, and PyTorch's layer over it, keep for later, one for each shape of a product. Chosen: those of
# some 25 and 12 numbers of rows. Measured: a flood of sessions took 350 MB with their defaults of 1024; 500 numbers of
# rows of one layer take 278 MB with these, 156 with the first bound, 36 with both. Generating a kernel takes 0.7 ms.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "64"}
# Rows to which a forward on packed weights is padded; see the module docstring.
MIN_ROWS = 4
# Capabilities (`torch.backends.cpu.get_cpu_capability`) on which packed weights were found to be faster.
PACKING_CAPABILITIES = {"AVX2", "AVX512"}
# Rows and tolerance of the comparison that shows whether a norm is `rms_norm`, and an activation SiLU.
PROBE_ROWS, PROBE_TOLERANCE = 4, 1e-5
# Names of the parts of a decoder layer of the Llama form, in transformers.
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS, QUERY_KEY_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
MLP_LINEARS = {"gate_proj", "up_proj", "down_proj"}


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether this CPU computes faster with packed weights of `dtype`."""
    # torch's stubs miss the annotations of these.
    backends: Any = torch.backends
    if not backends.mkldnn.is_available() or backends.cpu.get_cpu_capability() not in PACKING_CAPABILITIES:
        return False
    # Without the instructions for it, oneDNN's bfloat16 is slow.
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class PackedLinear(torch.nn.Linear):
    """A linear layer whose weight is packed for oneDNN. Made from another one in place, by `pack`."""

    @staticmethod
    def pack(linear: torch.nn.Linear) -> None:
        """Pack the weight of `linear`, whose class changes."""
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), None)
        linear.weight = torch.nn.Parameter(packed, requires_grad=False)
        linear.__class__ = PackedLinear

    def unpack(self) -> None:
        """Undo `pack`."""
        self.weight = torch.nn.Parameter(self.weight.to_dense(), requires_grad=False)
        self.__class__ = torch.nn.Linear  # type: ignore[assignment]  # the class that it had

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `torch.nn.Linear`."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            input, self.weight, self.bias, attr="none", scalars=[], algorithm=""
        )
        return output


def dense_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as the checkpoint has it, packed or not."""
    return weight.to_dense() if weight.is_mkldnn else weight


class CpuLayers:
    """The layers of one model, as transformers made them or prepared for forwards on a CPU."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._fused: list[Any] = []
        # Packed layers, with the embedding's weight that a layer was tied to.
        self._packed: list[tuple[PackedLinear, torch.nn.Parameter | None]] = []

    def prepare(self, test: Callable[[int], None]) -> None:
        """Pack the weights and fuse the decoder layers, as far as the model then passes a test.

        Args:
            test: raises an exception if the logits are wrong. Its argument is the rows to which forwards should be
                padded, which it lets them be.
        """
        if packs_weights(self._model.dtype):
            # They are read once, before the first product.
            for name, capacity in KERNEL_CACHES.items():
                os.environ.setdefault(name, capacity)
            self.pack()
            self.fuse()
            # A model may read the weight of a layer itself, or compute something else between its parts.
            for undo in (self.unfuse, self.restore):
                try:
                    test(MIN_ROWS)
                except Exception as error:
                    log.info("its layers cannot be %s: %s", "fused" if self._fused else "packed", error)
                    undo()
                else:
                    return
        test(1)

    def pack(self) -> None:
        """Pack the weights of all linear layers."""
        modules = list(self._model.modules())
        # The embedding still needs the weight of a head that is tied to it as it is.
        tied = {id(module.weight): module.weight for module in modules if isinstance(module, torch.nn.Embedding)}
        for module in modules:
            # A subclass, or a layer with a replaced forward, may compute something else.
            plain = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter
            if plain and "forward" not in vars(module) and packs_weights(module.weight.dtype):
                known = tied.get(id(module.weight))
                PackedLinear.pack(module)
                self._packed.append((module, known))  # type: ignore[arg-type]  # its class has changed

    def fuse(self) -> None:
        """Fuse the decoder layers of the Llama form, whose weights are packed."""
        for layer in self._model.modules():
            if "forward" not in vars(layer) and (fused := FusedDecoderLayer.of(layer)) is not None:
                layer.forward = fused
                self._fused.append(layer)

    def unfuse(self) -> None:
        """Undo `fuse`."""
        for layer in self._fused:
            del layer.forward
        self._fused = []

    def restore(self) -> None:
        """Leave the model as transformers made it."""
        self.unfuse()
        for linear, tied in self._packed:
            linear.unpack()
            if tied is not None:
                linear.weight = tied
        self._packed = []


class FusedDecoderLayer:
    """The forward of a decoder layer of the Llama form, as few operators; unchanged outside a runner's forward.

    RMSNorm, attention with RoPE on packed projections, RMSNorm, a gated MLP with SiLU; perhaps norms of queries and
    keys (Qwen 3). Names and a comparison of the parts show the form; whether the whole layer computes it is for the
    self-test to find out.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._forward, self._attention = layer.forward, attention
        self._head_size: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        self._linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        self._norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self._epsilon: float = layer.input_layernorm.variance_epsilon
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._head_norms: list[torch.Tensor] = [norm.weight for norm in norms if norm is not None]

    @classmethod
    def of(cls, layer: Any) -> FusedDecoderLayer | None:
        """The fused forward of `layer`; None if it has another form."""
        if {name for name, _ in layer.named_children()} != LAYER_PARTS:
            return None
        attention, mlp = layer.self_attn, layer.mlp
        # Rotary embeddings that a layer holds and does not use, in some versions of transformers, do no harm.
        parts = {name for name, _ in attention.named_children()} - {"rotary_emb"}
        if parts not in (PROJECTIONS, PROJECTIONS | QUERY_KEY_NORMS):
            return None
        if {name for name, _ in mlp.named_children()} - {"act_fn"} != MLP_LINEARS:
            return None
        linears = [getattr(attention, name) for name in PROJECTIONS]
        linears += [getattr(mlp, name) for name in MLP_LINEARS]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name) for name in parts & QUERY_KEY_NORMS]
        if not (all(type(linear) is PackedLinear for linear in linears) and all(map(_is_rms_norm, norms))):
            return None
        size, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
        probe = torch.linspace(-4, 4, 64, dtype=linears[0].weight.dtype)
        if not (isinstance(size, int) and isinstance(scaling, float) and _agree(mlp.act_fn(probe), silu(probe))):
            return None
        # One epsilon is passed for all.
        return cls(layer) if len({norm.variance_epsilon for norm in norms}) == 1 else None

    def __call__(
        self, hidden_states: torch.Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        context = get_forward_context()
        # The adapters' hooks are on the separate layers.
        if context is None or context.lora_mask is not None or position_embeddings is None:
            unfused: torch.Tensor = self._forward(
                hidden_states, *args, position_embeddings=position_embeddings, **kwargs
            )
            return unfused
        hidden = hidden_states[0]
        # Looked up here: a version that is loaded later may replace equal tensors by its own.
        weights, biases = ([getattr(linear, name) for linear in self._linears] for name in ("weight", "bias"))
        query, key, value = project(
            hidden,
            weights[:3],
            biases[:3],
            norm=self._norms[0],
            head_norms=self._head_norms,
            epsilon=self._epsilon,
            rope=position_embeddings,
            size=self._head_size,
        )
        attended = attend(self._attention, query, key, value, None, scaling=self._scaling)[0]
        attended = attended[0].flatten(1)
        return finish_layer(attended, hidden, weights[3:], biases[3:], norm=self._norms[1], epsilon=self._epsilon)[None]


@scripted
def project(
    hidden: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    *,
    norm: torch.Tensor,
    head_norms: list[torch.Tensor],
    epsilon: float,
    rope: tuple[torch.Tensor, torch.Tensor],
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A decoder layer up to its attention: (rows, hidden size) -> queries, keys and values, (1, heads, rows, size).

    Args:
        weights, biases: of the linear layers of queries, keys and values; the weights are packed.
        norm: weight of the RMSNorm before; `epsilon` is that of all norms.
        head_norms: weights of the RMSNorms of queries and of keys, if there are any.
        rope: cosines and sines (1, rows, size), with the halves of a head as pairs.
        size: size of a head.
    """
    rows, half = hidden.shape[0], size // 2
    normed = torch.rms_norm(hidden, [hidden.shape[1]], norm, epsilon)
    parts: list[torch.Tensor] = []
    for weight, bias in zip(weights, biases):  # noqa: B905  # TorchScript's zip has no `strict`.
        parts.append(  # Nor has it comprehensions over `zip`.
            torch.ops.mkldnn._linear_pointwise(normed, weight, bias, attr="none", scalars=[], algorithm="")
        )
    query, key, value = parts
    if len(head_norms) == 2:
        query = torch.rms_norm(query.view(rows, -1, size), [size], head_norms[0], epsilon).flatten(1)
        key = torch.rms_norm(key.view(rows, -1, size), [size], head_norms[1], epsilon).flatten(1)
    heads = torch.cat([query, key], 1).view(rows, -1, 2, half)
    first, second = heads[:, :, 0], heads[:, :, 1]
    cosines, sines = rope[0].view(rows, 1, 2, half), rope[1].view(rows, 1, 2, half)
    rotated = heads * cosines
    rotated[:, :, 0].addcmul_(second, sines[:, :, 0], value=-1)
    rotated[:, :, 1].addcmul_(first, sines[:, :, 1])
    by_head = rotated.view(1, rows, -1, size).transpose(1, 2)
    query_heads = query.shape[1] // size
    return by_head[:, :query_heads], by_head[:, query_heads:], value.view(1, rows, -1, size).transpose(1, 2)


@scripted
def finish_layer(
    attended: torch.Tensor,
    hidden: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    *,
    norm: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """A decoder layer from its attention on: (rows, heads x size) and (rows, hidden size) -> (rows, hidden size).

    Args:
        weights, biases: of the linear layers of the attention's output, and of gate, up and down of the MLP.
        norm: weight of the RMSNorm in between.
    """
    out, gate, up, down = weights
    out_bias, gate_bias, up_bias, down_bias = biases
    hidden = torch.ops.mkldnn._linear_pointwise(attended, hidden, out, out_bias, "add")
    normed = torch.rms_norm(hidden, [hidden.shape[1]], norm, epsilon)
    gated = torch.ops.mkldnn._linear_pointwise(normed, gate, gate_bias, attr="swish", scalars=[], algorithm="")
    gated = torch.ops.mkldnn._linear_pointwise(normed, gated, up, up_bias, "mul")
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(gated, hidden, down, down_bias, "add")
    return output


def _norm_arguments(norm: Any) -> tuple[tuple[int, ...], torch.Tensor, float]:
    """The arguments of `rms_norm` after its input, for an RMSNorm of transformers."""
    return tuple(norm.weight.shape), norm.weight, norm.variance_epsilon


def _is_rms_norm(norm: Any) -> bool:
    """Whether a norm of transformers computes `rms_norm`."""
    if not (isinstance(getattr(norm, "weight", None), torch.Tensor) and hasattr(norm, "variance_epsilon")):
        return False
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(PROBE_ROWS, norm.weight.shape[-1], generator=generator).to(norm.weight.dtype)
    return norm.weight.ndim == 1 and _agree(norm(probe), rms_norm(probe, *_norm_arguments(norm)))


def _agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    # One rounding to the dtype may differ.
    return torch.allclose(actual, expected, rtol=max(PROBE_TOLERANCE, torch.finfo(actual.dtype).eps), atol=1e-6)
