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

from cloud_verifier.model.batch import AttentionSpan, ForwardBatch, SegmentCache
from cloud_verifier.model.torchscript import scripted

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
        return attend_on_gpu(module, query, key, value, scaling=scaling, softcap=softcap, s_aux=s_aux), None
    batch: ForwardBatch = get_forward_context()
    layer: Any = module.layer_idx
    heads = key.shape[1]
    group = query.shape[1] // heads
    # Grouped queries become extra rows of their KV head, so that keys and values are not repeated.
    queries = query[0].view(heads, group, *query.shape[2:])
    explicit = softcap is not None or s_aux is not None
    # (rows, heads, group, value size) of each segment.
    outputs: list[torch.Tensor] = []
    for index, (first_key, mask) in enumerate(batch.grouped_masks(span, group, None if explicit else query.dtype)):
        start, count, cache = batch.starts[index], len(batch.segments[index]), batch.caches[index]
        own = queries[:, :, start : start + count], key[0, :, start : start + count], value[0, :, start : start + count]
        if len(cache.pages) == 1 and not (first_key or explicit):
            outputs.append(attend_page(*own, cache.pages[0][layer], cache.new_rows[0][layer], mask, scaling))
            continue
        keys, values = _store(cache, layer, *own[1:], first=first_key)
        grouped = own[0].flatten(1, 2)
        if explicit:
            sinks = None if s_aux is None else s_aux.view(heads, group, 1).expand(-1, -1, count).flatten(1)
            output = explicit_attention(grouped, keys, values, mask, scaling=scaling, softcap=softcap, sinks=sinks)
        else:
            output = scaled_dot_product_attention(grouped[None], keys[None], values[None], mask, scale=scaling)[0]
        outputs.append(output.view(heads, group, count, -1).permute(2, 0, 1, 3))
    if batch.padding:
        outputs.append(outputs[-1][-1:].expand(batch.padding, -1, -1, -1))
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    # Contiguous: some models view it with other sizes.
    return attended.flatten(1, 2).contiguous()[None], None


@scripted
def attend_page(
    queries: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    page: torch.Tensor,
    new_rows: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one segment whose sequence has one page.

    Args:
        queries: (heads, group, rows, key size).
        key, value: (heads, rows, size); they are written to the cache.
        page, new_rows: keys and values of the sequence with the segment, and of the segment alone, in the cache:
            (2, heads, tokens, size), perhaps with more heads and larger sizes.
        mask: (group x rows, tokens), see `ForwardBatch.grouped_masks`.

    Returns (rows, heads, group, value size).
    """
    heads, group, rows, key_size = queries.shape
    value_size = value.shape[2]
    new_rows[0, :heads, :, :key_size].copy_(key)
    new_rows[1, :heads, :, :value_size].copy_(value)
    keys, values = page[:1, :heads, :, :key_size], page[1:, :heads, :, :value_size]
    grouped = queries.reshape(1, heads, group * rows, key_size)
    output = scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
    return output.view(heads, group, rows, value_size).permute(2, 0, 1, 3)


def attend_on_gpu(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """See `attend`: by the operator of `graph_attention`."""
    span: AttentionSpan = module.attention_span
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"span": span.size, "chunked": span.chunked, "softcap": softcap or 0.0, "sinks": s_aux}
    attended: torch.Tensor = torch.ops.flexspec.attend(query, key, value, module.layer_number, scaling, **options)
    return attended


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
    cache: SegmentCache, layer: int, key: torch.Tensor, value: torch.Tensor, *, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rows (heads, rows, size) after the sequence; return its keys and values from `first` on, rows included."""
    start = 0
    for new_rows in cache.new_rows:
        page_keys, page_values = new_rows[layer].unbind(0)
        stop = start + page_keys.shape[1]
        _part(page_keys, key).copy_(key[:, start:stop])
        _part(page_values, value).copy_(value[:, start:stop])
        start = stop
    pages = cache.pages[first // cache.page_tokens :]
    cached = pages[0][layer] if len(pages) == 1 else torch.cat([page[layer] for page in pages], dim=2)
    keys, values = cached.unbind(0)
    if skipped := first % cache.page_tokens:
        keys, values = keys[:, skipped:], values[:, skipped:]
    return _part(keys, key), _part(values, value)


def _part(cached: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The heads and sizes of (heads, tokens, size) that a layer with these rows uses."""
    heads, _, size = rows.shape
    return cached if cached.shape[::2] == (heads, size) else cached[:heads, :, :size]


AttentionInterface.register(IMPLEMENTATION_NAME, attend)
