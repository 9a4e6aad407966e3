"""Attention over the paged KV cache, in place of the attention functions of transformers' models.

A model that `fast_tier` has prepared passes the queries, keys and values of a forward to `attend`. It writes the keys
and values to the pages of their sequences and masks each row as its segment and the layer's span say. The description
of the forward is passed out of band, per thread, by `set_forward_context`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cloud_verifier.model.batch import AttentionSpan, ForwardBatch
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
        module: the attention layer, with the `attention_span` that `fast_tier` found. On a CPU its `layer_idx` is used,
            on CUDA its `layer_number` buffer (see `cuda_graphs`).
        query: (1, query heads, rows, key size).
        key: (1, KV heads, rows, key size).
        value: (1, KV heads, rows, value size).
        attention_mask: ignored; the forward context has the masks.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118); None to leave them.
        s_aux: (query heads,) attention sinks: a score of each head that takes part in the softmax and has no value
            (gpt-oss); None for none.

    Returns (1, rows, query heads, value size), and None for the attention weights.
    """
    span: AttentionSpan = module.attention_span  # type: ignore[assignment]  # torch annotates attributes as tensors
    if query.is_cuda:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        options = {"span": span.size, "chunked": span.chunked, "softcap": softcap or 0.0, "sinks": s_aux}
        return torch.ops.flexspec.attend(query, key, value, module.layer_number, scaling, **options), None
    batch: ForwardBatch = get_forward_context()
    layer: Any = module.layer_idx
    heads = key.shape[1]
    group = query.shape[1] // heads
    # Grouped queries become extra rows of their KV head, so that keys and values are not repeated.
    queries = query[0].view(heads, group, *query.shape[2:])
    out = torch.empty(query.shape[2], heads, group, value.shape[3], dtype=query.dtype)
    for segment, start, (first_key, mask) in zip(batch.segments, batch.starts, batch.visible_keys(span), strict=True):
        rows = slice(start, start + len(segment))
        keys, values = _store(batch.pool, segment.sequence, layer, key[0, :, rows], value[0, :, rows], first=first_key)
        grouped = queries[:, :, rows].flatten(1, 2)
        grouped_mask = None if mask is None else mask.repeat(group, 1) if group > 1 else mask
        if softcap is None and s_aux is None:
            output = scaled_dot_product_attention(grouped[None], keys[None], values[None], grouped_mask, scale=scaling)[
                0
            ]
        else:
            sinks = None if s_aux is None else s_aux.view(heads, group, 1).expand(-1, -1, len(segment)).flatten(1)
            output = explicit_attention(
                grouped, keys, values, grouped_mask, scaling=scaling, softcap=softcap, sinks=sinks
            )
        out[rows] = output.view(heads, group, len(segment), -1).permute(2, 0, 1, 3)
    return out.flatten(1, 2)[None], None


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention step by step, for what `scaled_dot_product_attention` lacks; also the reference of the CUDA kernels.

    Args:
        query: (heads, rows, key size).
        key: (heads, keys, key size).
        value: (heads, keys, value size).
        mask: (rows, keys) bool: what each row attends to; None for everything.
        sinks: (heads, rows) additional scores without values.

    Returns (heads, rows, value size).
    """
    scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[..., None].to(scores.dtype)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[1]] @ value


def _store(
    pool: KVCachePool, sequence: CachedSequence, layer: int, key: torch.Tensor, value: torch.Tensor, *, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rows (heads, rows, size) after the sequence; return its keys and values from `first` on, rows included."""
    page_tokens, past = pool.page_tokens, sequence.length
    heads, key_size, value_size = key.shape[0], key.shape[2], value.shape[2]
    length = past + key.shape[1]
    position = past
    while position < length:
        offset = position % page_tokens
        count = min(page_tokens - offset, length - position)
        page = pool.view(sequence.pages[position // page_tokens])[layer]
        page[0, :heads, offset : offset + count, :key_size] = key[:, position - past : position - past + count]
        page[1, :heads, offset : offset + count, :value_size] = value[:, position - past : position - past + count]
        position += count
    skipped = first // page_tokens
    views = [pool.view(page)[layer] for page in sequence.pages[skipped : -(-length // page_tokens)]]
    cached = views[0] if len(views) == 1 else torch.cat(views, dim=2)
    rows = slice(first - skipped * page_tokens, length - skipped * page_tokens)
    return cached[0, :heads, rows, :key_size], cached[1, :heads, rows, :value_size]


AttentionInterface.register(IMPLEMENTATION_NAME, attend)
