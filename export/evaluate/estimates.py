"""How large a draft will be, from its configuration alone: parameters, bytes on disk by kind of tensor, memory.

No weight is read and none is made: the model is built without storage. What the exported graph adds to its tensors
(nodes and names, some 30 kB) and the tokenizer are not counted. `bundle.footprint` measures a bundle that exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from export.bundle.quantize import BLOCK_SIZE

# Bits of a weight, by what `draft-export onnx --weights` calls them.
BITS = {"int4": 4, "int8": 8}
EMBEDDING, TIED = "embedding", "embedding and head"
KINDS = {"embed_tokens": EMBEDDING, "lm_head": "head", "self_attn": "attention", "mlp": "feed-forward"}
VECTORS = "norms and biases"
ROTARY = "rotary tables"
# A board's process without the draft's weights and cache: interpreter, libraries, working memory.
PROCESS_BYTES = 90_000_000


@dataclass(frozen=True)
class Estimate:
    """What a draft will take.

    Attributes:
        parameters: a tied head is counted once.
        tensor_bytes: on disk, by kind.
        cache_bytes: keys and values of one token in all layers, float32.
        context: longest text in tokens.
    """

    parameters: int
    tensor_bytes: Mapping[str, int]
    cache_bytes: int
    context: int

    @property
    def weight_bytes(self) -> int:
        """On disk: the size by which profiles know a draft."""
        return sum(self.tensor_bytes.values())

    @property
    def memory_bytes(self) -> int:
        """Of a board's process with a text as long as the context."""
        return PROCESS_BYTES + self.weight_bytes + self.context * self.cache_bytes


def estimate(config: PretrainedConfig, weights: str = "int8", context: int | None = None) -> Estimate:
    """The estimate for a draft with this configuration of its own, as a fused graph.

    Args:
        weights: one of BITS.
        context: longest text; None for the model's.
    """
    context = context or config.max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    sizes: Counter[str] = Counter()
    parameters = 0
    for name, tensor in model.named_parameters():
        parameters += tensor.numel()
        kind = VECTORS
        if tensor.dim() == 2:
            kind = next(kind for part, kind in KINDS.items() if part in name)
            kind = TIED if tied and kind == EMBEDDING else kind
        sizes[kind] += _stored(tensor.shape, kind, BITS[weights])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # A sine and a cosine for each position and pair of dimensions.
    sizes[ROTARY] = 4 * context * head_dim
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return Estimate(parameters, dict(sizes), cache, context)


def _stored(shape: torch.Size, kind: str, bits: int) -> int:
    """Bytes of a tensor: vectors float32, matrices in blocks with a float32 scale each."""
    # An embedding whose rows are no whole blocks stays float32.
    if len(shape) < 2 or (kind in (EMBEDDING, TIED) and shape[1] % BLOCK_SIZE):
        return 4 * shape.numel()
    blocks = shape[0] * -(-shape[1] // BLOCK_SIZE)
    return blocks * (BLOCK_SIZE * bits // 8 + 4)
