"""Attention over the pool: what transformers' models call in place of their own.

A model that is loaded with `attn_implementation=NAME` hands its queries, keys and values of one forward to `attend`,
which puts the keys and values where the pool keeps those of their texts, and lets every row see what its piece says.
What the forward is made of is said beside, by `running`, for the calling thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cloud_verifier.model.batch import Step

NAME = "flexspec"

_of_thread = threading.local()


@contextlib.contextmanager
def running(step: Any) -> Iterator[None]:
    """Makes `step` what the calling thread's forwards are made of."""
    _of_thread.step = step
    try:
        yield
    finally:
        _of_thread.step = None


def current() -> Any:
    """The step of the calling thread's forward; None outside of one of ours."""
    return getattr(_of_thread, "step", None)


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
    """The attention of one layer, in transformers' form.

    Args:
        module: the attention layer, which knows its `layer_idx`; on CUDA see `graphs`.
        query: (1, query heads, rows, size).
        key, value: (1, heads, rows, size).

    Returns (1, rows, query heads, size).

    Raises:
        NotImplementedError: the model bounds its scores, or has attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with bounded scores, or with sinks")
    if query.is_cuda:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.flexspec.attend(query, key, value, module.layer_number, scaling), None
    return _piece_by_piece(current(), int(module.layer_idx), query, key, value, scaling), None


def _piece_by_piece(
    step: Step, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    heads, size = key.shape[1], key.shape[3]
    group = query.shape[1] // heads
    # Queries that share keys are rows of one head: that way nothing is repeated.
    queries = query[0].unflatten(0, (heads, group))
    out = torch.empty(query.shape[2], heads, group, size, dtype=query.dtype)
    for piece, start, mask in zip(step.pieces, step.starts, step.masks, strict=True):
        rows = slice(start, start + len(piece))
        keys, values = _stored(step, piece.text.pages, piece.text.length, layer, key[0, :, rows], value[0, :, rows])
        asked = queries[:, :, rows].flatten(1, 2)
        seen = None if mask is None else mask.repeat(group, 1) if group > 1 else mask
        answer = scaled_dot_product_attention(asked[None], keys[None], values[None], seen, scale=scaling)[0]
        out[rows] = answer.unflatten(1, (group, len(piece))).permute(2, 0, 1, 3)
    return out.flatten(1, 2)[None]


def _stored(
    step: Step, pages: list[int], past: int, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts the rows (heads, rows, size) behind the text's `past` tokens; its keys and values with them."""
    size, length = step.pool.page, past + key.shape[1]
    position = past
    while position < length:
        offset = position % size
        count = min(size - offset, length - position)
        page = step.pool.view(pages[position // size])[layer]
        page[0, :, offset : offset + count] = key[:, position - past : position - past + count]
        page[1, :, offset : offset + count] = value[:, position - past : position - past + count]
        position += count
    views = [step.pool.view(page)[layer] for page in pages[: -(-length // size)]]
    whole = views[0] if len(views) == 1 else torch.cat(views, dim=2)
    return whole[0, :, :length], whole[1, :, :length]


AttentionInterface.register(NAME, attend)
