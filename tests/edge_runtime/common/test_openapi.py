"""OpenAPI documents are built once, whoever asks."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from edge_runtime.common.openapi import DocumentCache


async def test_a_document_is_built_once_for_all_who_ask() -> None:
    built: list[tuple[int, bool]] = []
    released = threading.Event()

    def build(size: int, keys: bool) -> dict[str, Any]:
        released.wait(60)
        built.append((size, keys))
        return {"size": size, "keys": keys}

    documents = DocumentCache(build)
    leaving, *waiting = [asyncio.create_task(documents.get(1, True)) for _ in range(3)]
    await asyncio.sleep(0)
    # Whoever asks first and disconnects does not take the document from the others.
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    released.set()
    assert await asyncio.gather(*waiting) == [b'{"size":1,"keys":true}'] * 2
    assert await documents.get(1, True) == b'{"size":1,"keys":true}'
    assert await documents.get(2, True) == b'{"size":2,"keys":true}'
    assert built == [(1, True), (2, True)]
