"""Bounds on what a model's configuration says, checked before anything is built or loaded from it.

A configuration is untrusted input: a billion layers would fill the memory with empty objects, and some settings make
transformers read files, or run code, that are not part of the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_runtime.protocol.bundle import ContextLength, HeadCount, HiddenSize, LayerCount, VocabularySize
from edge_runtime.protocol.errors import TargetError

# Heads and widths of parts that a model may lack. Some models name one for each layer.
OptionalHeads = Annotated[int, msgspec.Meta(ge=0, le=1 << 10)]
Width = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
ExpertCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 14)]
# The attention functions that transformers has itself; other names are those of repositories of kernels.
AttentionName = Annotated[str, msgspec.Meta(pattern=r"\A\w*\Z")]


class ModelSettings(msgspec.Struct, frozen=True):
    """The settings of a configuration, or of a part of a multimodal one, that have bounds; it may lack any of them.

    The names are those that transformers' architectures have for layers, sizes, and the longest text. Of the last
    group only the absence is allowed: they name other files to load.
    """

    num_hidden_layers: LayerCount | None = None
    num_layers: LayerCount | None = None
    n_layer: LayerCount | None = None
    n_layers: LayerCount | None = None
    hidden_size: HiddenSize | None = None
    n_embd: HiddenSize | None = None
    d_model: HiddenSize | None = None
    head_dim: HiddenSize | None = None
    vocab_size: VocabularySize | None = None
    max_position_embeddings: ContextLength | None = None
    n_positions: ContextLength | None = None
    n_ctx: ContextLength | None = None
    max_seq_len: ContextLength | None = None
    max_sequence_length: ContextLength | None = None
    seq_length: ContextLength | None = None
    context_length: ContextLength | None = None
    num_attention_heads: HeadCount | list[OptionalHeads] | None = None
    n_head: HeadCount | None = None
    num_key_value_heads: OptionalHeads | list[OptionalHeads] | None = None
    intermediate_size: Width | list[Width] | None = None
    moe_intermediate_size: Width | list[Width] | None = None
    ffn_dim: Width | None = None
    n_inner: Width | None = None
    num_experts: ExpertCount | list[ExpertCount] | None = None
    num_local_experts: ExpertCount | None = None
    n_routed_experts: ExpertCount | None = None
    attn_implementation: AttentionName | None = None

    transformers_weights: None = None
    configuration_files: None = None


def check_model_settings(settings: Mapping[str, Any], where: Path | str) -> None:
    """Check a configuration and those of its parts (`text_config` and the like).

    Args:
        where: where it is from, for the message.

    Raises:
        TargetError: a setting is out of bounds.
    """
    try:
        msgspec.convert(settings, ModelSettings)
    except msgspec.ValidationError as error:
        raise TargetError(f"{where} is refused: {error}; copy the model again, or correct the file") from None
    for name, part in settings.items():
        if name.endswith("_config") and isinstance(part, dict):
            check_model_settings(part, where)
