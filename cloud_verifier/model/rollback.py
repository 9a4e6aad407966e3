"""Whether the cache of a model can roll back, derived from its configuration alone.

Rejected tokens must leave no trace in a model's cache, so every layer must keep plain keys and values of all positions.
A recurrent or hybrid layer folds each token into its state, and a sliding window drops the tokens that leave it:
neither can be undone.
"""

from __future__ import annotations

from typing import Any

# Layer types, as transformers names them, whose cache is plain keys and values.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Recurrent and hybrid model types whose configurations name no layer types.
RECURRENT_MODEL_TYPES = {
    "mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "zamba", "zamba2", "bamba", "xlstm",
}  # fmt: skip


def layers_without_rollback(config: Any) -> list[str]:
    """Types of the layers of a transformers configuration whose state cannot roll back, sorted."""
    types = set(getattr(config, "layer_types", None) or [])
    if not types and config.model_type in RECURRENT_MODEL_TYPES:
        return [config.model_type]
    return sorted(types - ATTENTION_LAYERS)


def sliding_window(config: Any) -> int | None:
    """Number of tokens that a sliding-window layer keeps; None if the model has no such layer."""
    has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window: int | None = (
        getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    )
    return window if has_sliding_layers and window else None
