"""Attention of long prefill chunks on CUDA: keys and values gathered from their pages once, then torch's flash kernel.

The paged kernel (`kernels.attend`) reads every key once for each 16 queries, which is right for rounds. A chunk of a
prompt has many queries, so the copy of its keys and values costs little, and the flash kernel reaches several times the
paged kernel's share of the GPU's matrix rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import as_stored

# Shorter chunks go through the paged kernel. Chosen: below this the gathering and a launch for each segment cost more.
MIN_CHUNK_ROWS = 256
# What torch's flash kernel computes.
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD = 256


class PrefillChunk(NamedTuple):
    """A long segment of a forward whose rows are a chain.

    Attributes:
        first, rows: its rows in the forward.
        past: cached tokens before it.
        pages: (pages,) int64 pages of the sequence, the chunk included, on the device.
    """

    first: int
    rows: int
    past: int
    pages: torch.Tensor


def is_chunk(segment: Segment) -> bool:
    """Whether a segment is a part of a prompt that is long enough for `attend_chunk`."""
    return segment.sampling is None and segment.keep_all and len(segment) >= MIN_CHUNK_ROWS


def find_chunks(segments: Sequence[Segment], page_tokens: int, device: torch.device) -> list[PrefillChunk]:
    """The chunks among the segments of a forward; their sequences have all pages."""
    chunks, first = [], 0
    for segment in segments:
        if is_chunk(segment):
            past, rows = segment.sequence.length, len(segment)
            pages = torch.tensor(segment.sequence.pages[: -(-(past + rows) // page_tokens)], dtype=torch.int64)
            if device.type == "cuda":
                pages = pages.pin_memory()
            chunks.append(PrefillChunk(first, rows, past, pages.to(device, non_blocking=True)))
        first += len(segment)
    return chunks


def flash_takes(
    query: torch.Tensor, value: torch.Tensor, span: int, softcap: float, sinks: torch.Tensor | None
) -> bool:
    """Whether `attend_chunk` can compute the attention of a layer, see `kernels.attend`, and faster than the latter."""
    plain = not span and not softcap and sinks is None
    size = query.shape[3]
    return plain and query.dtype in FLASH_DTYPES and size == value.shape[3] <= MAX_FLASH_HEAD and size % 8 == 0


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    slab: torch.Tensor,
    layer: torch.Tensor,
    scaling: float,
    chunk: PrefillChunk,
) -> torch.Tensor:
    """Causal attention of the rows of `chunk`, whose keys and values are already in the pool.

    Args:
        query: (1, query heads, rows of the forward, size).
        key, value: (1, KV heads, rows of the forward, size), of the slab's dtype.
        slab: see `KVCachePool.slabs`.
        layer: the layer's number, a tensor on the device.

    Returns (rows of the chunk, query heads, size).
    """
    own = slice(chunk.first, chunk.first + chunk.rows)
    queries = query[:, :, own]
    if chunk.past or slab.dtype != query.dtype:
        _, heads, _, size = key.shape
        # (pages, 2, heads, page, size) -> (2, heads, tokens, size)
        cached = as_stored(slab)[chunk.pages, layer.long()][:, :, :heads, :, :size].permute(1, 2, 0, 3, 4)
        tokens = cached.reshape(2, 1, heads, -1, size)[:, :, :, : chunk.past + chunk.rows]
        keys, values = tokens.view(slab.dtype).to(query.dtype).unbind(0)
    else:
        keys, values = key[:, :, own], value[:, :, own]
    mask = causal_lower_right(chunk.rows, chunk.past + chunk.rows)
    grouped = query.shape[1] != key.shape[1]
    attended = scaled_dot_product_attention(queries, keys, values, mask, scale=scaling, enable_gqa=grouped)
    return attended[0].transpose(0, 1)
