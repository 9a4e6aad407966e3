"""Attention over the paged KV cache, in place of the attention functions of transformers' models.

A model loaded with `attn_implementation=IMPLEMENTATION_NAME` passes the queries, keys and values of a forward to
`attend`. It writes the keys and values to the pages of their sequences and masks each row as its segment says. The
description of the forward is passed out of band, per thread, by `set_forward_context`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cloud_verifier.model.batch import ForwardBatch
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool

IMPLEMENTATION_NAME = "flexspec"

_thread_state = threading.local()


@contextlib.contextmanager
def set_forward_context(context: Any) -> Iterator[None]:
    """Make `context` the forward context of the calling thread: a `ForwardBatch`, or on CUDA its counterpart."""
    _thread_state.context = context
    try:
        yield
    finally:
        _thread_state.context = None


def get_forward_context() -> Any:
    """The forward context of the calling thread; None outside a forward of a runner."""
    return getattr(_thread_state, "context", None)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature that transformers expects of an attention function.

    Args:
        module: the attention layer. On a CPU its `layer_idx` is used, on CUDA its `layer_number` buffer (see
            `cuda_graphs`).
        query: (1, query heads, rows, head size).
        key, value: (1, KV heads, rows, head size).
        attention_mask: ignored; the forward context has the masks.

    Returns (1, rows, query heads, head size), and None for the attention weights.

    Raises:
        NotImplementedError: the model uses logit soft-capping or attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with logit soft-capping or attention sinks is not supported")
    if query.is_cuda:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.flexspec.attend(query, key, value, module.layer_number, scaling), None
    batch: ForwardBatch = get_forward_context()
    layer: Any = module.layer_idx
    return _attend_by_segment(batch, int(layer), query=query, key=key, value=value, scaling=scaling), None


def _attend_by_segment(
    batch: ForwardBatch,
    layer: int,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    heads, size = key.shape[1], key.shape[3]
    group = query.shape[1] // heads
    # Grouped queries become extra rows of their KV head, so that keys and values are not repeated.
    queries = query[0].view(heads, group, *query.shape[2:])
    out = torch.empty(query.shape[2], heads, group, size, dtype=query.dtype)
    for segment, start, mask in zip(batch.segments, batch.starts, batch.masks, strict=True):
        rows = slice(start, start + len(segment))
        keys, values = _store(batch.pool, segment.sequence, layer, key[0, :, rows], value[0, :, rows])
        grouped = queries[:, :, rows].flatten(1, 2)
        grouped_mask = None if mask is None else mask.repeat(group, 1) if group > 1 else mask
        output = scaled_dot_product_attention(grouped[None], keys[None], values[None], grouped_mask, scale=scaling)[0]
        out[rows] = output.view(heads, group, len(segment), size).permute(2, 0, 1, 3)
    return out.flatten(1, 2)[None]


def _store(
    pool: KVCachePool, sequence: CachedSequence, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rows (heads, rows, head size) after the sequence; return all its keys and values, those rows included."""
    page_tokens, past = pool.page_tokens, sequence.length
    length = past + key.shape[1]
    position = past
    while position < length:
        offset = position % page_tokens
        count = min(page_tokens - offset, length - position)
        page = pool.view(sequence.pages[position // page_tokens])[layer]
        page[0, :, offset : offset + count] = key[:, position - past : position - past + count]
        page[1, :, offset : offset + count] = value[:, position - past : position - past + count]
        position += count
    views = [pool.view(page)[layer] for page in sequence.pages[: -(-length // page_tokens)]]
    cached = views[0] if len(views) == 1 else torch.cat(views, dim=2)
    return cached[0, :, :length], cached[1, :, :length]


AttentionInterface.register(IMPLEMENTATION_NAME, attend)
