"""Estimates the size of a draft from its configuration alone: parameters, bytes on disk by kind of tensor, memory.

No weights are read or allocated: the model is built on the meta device. The graph itself (nodes and names, some 30 kB)
is not counted. `bundle.footprint` measures an existing bundle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from export.bundle.quantize import BLOCK_SIZE

# Bits of a weight, by the name of the weight type in `draft-export onnx --weights`.
WEIGHT_BITS = {"int4": 4, "int8": 8}
EMBEDDING, TIED = "embedding", "embedding and head"
TENSOR_KINDS = {"embed_tokens": EMBEDDING, "lm_head": "head", "self_attn": "attention", "mlp": "feed-forward"}
VECTORS = "norms and biases"
# Measured: memory of a board's process without the draft's weights and KV cache (interpreter, libraries, buffers).
PROCESS_BYTES = 90_000_000
# Measured with byte-level BPE tokenizers of 32,000 to 262,000 tokens, after what was freed has been returned to the
# system: 336 to 440 bytes.
TOKENIZER_BYTES_PER_TOKEN = 360


@dataclass(frozen=True)
class SizeEstimate:
    """Estimated size of a draft.

    Attributes:
        parameters: number of parameters; a tied head is counted once.
        tensor_bytes: bytes on disk by kind of tensor.
        cache_bytes: KV cache of one token in all layers, float32.
        context: longest text in tokens.
        tokenizer_bytes: memory of the tokenizer.
        rotary_bytes: the tables of the rotary embedding, which are computed when the graph is loaded.
    """

    parameters: int
    tensor_bytes: Mapping[str, int]
    cache_bytes: int
    context: int
    rotary_bytes: int
    tokenizer_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk: the size by which board profiles identify a draft."""
        return sum(self.tensor_bytes.values())

    @property
    def memory_bytes(self) -> int:
        """Memory of a board's process with a text as long as the context."""
        return (
            PROCESS_BYTES
            + self.tokenizer_bytes
            + self.weight_bytes
            + self.rotary_bytes
            + self.context * self.cache_bytes
        )


def estimate_size(config: PretrainedConfig, weights: str = "int8", context: int | None = None) -> SizeEstimate:
    """Estimate the size of a draft, exported as a fused graph.

    Args:
        config: the draft's own configuration.
        weights: one of WEIGHT_BITS.
        context: longest text; None for the model's.
    """
    context = context or config.max_position_embeddings
    auto_model: Any = AutoModelForCausalLM  # its stubs miss the annotations of from_config
    with torch.device("meta"):
        model = auto_model.from_config(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    sizes: Counter[str] = Counter()
    parameters = 0
    for name, tensor in model.named_parameters():
        parameters += tensor.numel()
        kind = VECTORS
        if tensor.dim() == 2:
            kind = next(kind for part, kind in TENSOR_KINDS.items() if part in name)
            kind = TIED if tied and kind == EMBEDDING else kind
        sizes[kind] += _stored_bytes(tensor.shape, kind, WEIGHT_BITS[weights])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    # A sine and a cosine for each position and pair of dimensions.
    return SizeEstimate(
        parameters,
        dict(sizes),
        cache_bytes,
        context,
        rotary_bytes=4 * context * head_dim,
        tokenizer_bytes=TOKENIZER_BYTES_PER_TOKEN * config.vocab_size,
    )


def _stored_bytes(shape: torch.Size, kind: str, bits: int) -> int:
    """Bytes of a tensor: vectors are float32, matrices have blocks with a float16 scale each."""
    # An embedding whose rows are not whole blocks stays float32.
    if len(shape) < 2 or (kind in (EMBEDDING, TIED) and shape[1] % BLOCK_SIZE):
        return 4 * shape.numel()
    blocks = shape[0] * -(-shape[1] // BLOCK_SIZE)
    return blocks * (BLOCK_SIZE * bits // 8 + 2)
