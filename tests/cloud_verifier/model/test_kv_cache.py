"""How many tokens a KV cache has by default."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from cloud_verifier.model.kv_cache import (
    CACHE_TOKENS,
    CPU_SHARE,
    DEVICE_SHARE,
    DEVICE_SHARE_OF_SEVERAL,
    PAGE_TOKENS,
    SLACK_PAGES,
    KVCacheShape,
    affordable_tokens,
)

GIBIBYTE = 1 << 30


def shape_of(device: str, layers: int = 32) -> KVCacheShape:
    return KVCacheShape(layers, 8, 128, torch.bfloat16, torch.device(device))


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the machine and its GPU say about their free memory, in bytes."""
    free = {"cpu": 64 * GIBIBYTE, "cuda": 100 * GIBIBYTE}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free["cpu"]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["cuda"], 140 * GIBIBYTE))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return free


def test_a_cpu_gives_half_of_its_memory_up_to_a_bound(free_memory: dict[str, int]) -> None:
    shape = shape_of("cpu")
    assert affordable_tokens([shape]) == CPU_SHARE * free_memory["cpu"] // shape.bytes_per_token
    free_memory["cpu"] *= 2
    assert affordable_tokens([shape]) == CACHE_TOKENS
    free_memory["cpu"] = 1000
    assert affordable_tokens([shape]) == 1


def test_a_gpu_gives_what_is_left_beside_its_forwards(free_memory: dict[str, int]) -> None:
    shape, workspace, page = shape_of("cuda"), 5 * GIBIBYTE, PAGE_TOKENS["cuda"]
    tokens = affordable_tokens([shape], workspace=workspace)
    assert tokens % page == 0
    # The pool adds pages for drafts, and one for padding.
    taken = (tokens + (SLACK_PAGES + 1) * page) * shape.bytes_per_token
    assert 0 <= DEVICE_SHARE * free_memory["cuda"] - workspace - taken < 2 * page * shape.bytes_per_token
    several = affordable_tokens([shape], several=True)
    assert several * shape.bytes_per_token <= DEVICE_SHARE_OF_SEVERAL * free_memory["cuda"]
    free_memory["cuda"] = GIBIBYTE
    assert affordable_tokens([shape], workspace=workspace) == page


def test_the_caches_of_target_and_draft_have_room_together(free_memory: dict[str, int]) -> None:
    target, draft = shape_of("cuda"), shape_of("cuda", layers=4)
    tokens = affordable_tokens([target, draft])
    assert tokens * (target.bytes_per_token + draft.bytes_per_token) <= DEVICE_SHARE * free_memory["cuda"]
    assert tokens < affordable_tokens([target])


def test_a_model_without_keys_and_values_has_the_usual_bound(free_memory: dict[str, int]) -> None:
    assert affordable_tokens([shape_of("cpu", layers=0)]) == CACHE_TOKENS
