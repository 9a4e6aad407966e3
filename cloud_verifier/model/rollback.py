"""Whether a model can take tokens back, told by its configuration alone.

Rejected tokens must leave no trace in a model's cache, so every layer must keep plain keys and values of all positions.
A recurrent or hybrid layer folds each token into its state, and a sliding window drops what has left it: neither can be
undone.
"""

from __future__ import annotations

from typing import Any

# Layer types, as transformers calls them, whose cache is plain keys and values.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Recurrent and hybrid families whose configurations name no layer types.
RECURRENT = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "zamba", "zamba2", "bamba", "xlstm"}


def forgetless_layers(config: Any) -> list[str]:
    """Types of the layers of a transformers configuration whose state cannot take a token back, sorted."""
    types = set(getattr(config, "layer_types", None) or [])
    if not types and config.model_type in RECURRENT:
        return [config.model_type]
    return sorted(types - ATTENTION_LAYERS)


def sliding_window(config: Any) -> int | None:
    """Tokens that a sliding layer keeps; None where no layer slides."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window: int | None = (
        getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    )
    return window if slides and window else None
