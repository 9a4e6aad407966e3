"""Attention of long prefill chunks from gathered pages, against attention step by step."""

from __future__ import annotations

from random import Random

import pytest
import torch

from cloud_verifier.model.attention import explicit_attention
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.chunk_attention import MIN_CHUNK_ROWS, attend_chunk, find_chunks, flash_takes, is_chunk
from cloud_verifier.model.kv_cache import CachedSequence
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.sampling import Sampling

PAGE, LAYERS, LAYER = 64, 3, 1


def make_chunk(past: int, rows: int, pages: list[int]) -> Segment:
    sequence = CachedSequence()
    sequence.length, sequence.pages = past, pages
    return Segment.from_tokens(sequence, [1] * rows)


def test_only_long_parts_of_prompts_are_chunks() -> None:
    assert is_chunk(make_chunk(0, MIN_CHUNK_ROWS, []))
    assert not is_chunk(make_chunk(0, MIN_CHUNK_ROWS - 1, []))
    tree = TokenTree(1, 1, [2] * MIN_CHUNK_ROWS, {})
    assert not is_chunk(Segment.from_tree(CachedSequence(), tree, Sampling()))


def test_what_the_flash_kernel_does_not_compute_is_left_to_the_paged_one() -> None:
    query = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
    assert flash_takes(query, query, 0, 0.0, None)
    assert not flash_takes(query, query, 128, 0.0, None)
    assert not flash_takes(query, query, 0, 5.0, None)
    assert not flash_takes(query, query, 0, 0.0, torch.zeros(4))
    assert not flash_takes(query.float(), query.float(), 0, 0.0, None)
    assert not flash_takes(query, query[..., :32], 0, 0.0, None)


@pytest.mark.parametrize("past", [0, 1, 63, 64, 130])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["heads", "groups"])
def test_a_chunk_attends_to_the_cached_tokens_and_to_its_own_up_to_each_row(past: int, heads: tuple[int, int]) -> None:
    query_heads, kv_heads = heads
    rows, size, first, total = MIN_CHUNK_ROWS + 5, 16, 7, MIN_CHUNK_ROWS + 20
    random, generator = Random(past), torch.Generator().manual_seed(past)
    pages = random.sample(range(1, 20), -(-(past + rows) // PAGE) + 1)
    [other, chunk] = [make_chunk(0, first, [19]), make_chunk(past, rows, pages)]
    # Another layer has more heads and a larger size; what no sequence holds is not a number.
    slab = torch.full((20, LAYERS, 2, kv_heads + 1, PAGE, size + 8), torch.nan)
    query = torch.randn(1, query_heads, total, size, generator=generator)
    key, value = (torch.randn(1, kv_heads, total, size, generator=generator) for _ in range(2))
    cached = torch.randn(2, kv_heads, past, size, generator=generator)
    own = slice(first, first + rows)
    keys, values = torch.cat([cached, torch.stack([key[0, :, own], value[0, :, own]])], 2)
    for kind, rows_of_kind in enumerate((keys, values)):
        for position in range(past + rows):
            page = pages[position // PAGE]
            slab[page, LAYER, kind, :kv_heads, position % PAGE, :size] = rows_of_kind[:, position]
    [found] = find_chunks([other, chunk], PAGE, torch.device("cpu"))
    assert found[:3] == (first, rows, past)
    layer = torch.tensor(LAYER, dtype=torch.int32)
    actual = attend_chunk(query, key, value, slab=slab, layer=layer, scaling=0.3, chunk=found)
    expected = explicit_attention(
        query[0, :, own],
        keys.repeat_interleave(query_heads // kv_heads, 0),
        values.repeat_interleave(query_heads // kv_heads, 0),
        chunk.attention_mask(),
        scaling=0.3,
    )
    torch.testing.assert_close(actual, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)
