"""The memory of responses is bounded, and the least recently used ones leave it first."""

from __future__ import annotations

import msgspec

from edge_runtime.service.conversation import ChatMessage
from edge_runtime.service.responses.schema import OutputMessage, OutputTextPart, ResponseObject
from edge_runtime.service.responses.store import ResponseStore


def make_response(name: str, text: str) -> ResponseObject:
    return ResponseObject(
        id=f"resp_{name}",
        created_at=0,
        status="completed",
        model="m",
        system_fingerprint="m@1",
        seed=0,
        instructions=None,
        max_output_tokens=None,
        output=[OutputMessage(f"msg_{name}", "completed", [OutputTextPart(text)])],
        parallel_tool_calls=True,
        previous_response_id=None,
        reasoning={},
        store=True,
        temperature=1.0,
        text={},
        tool_choice="auto",
        tools=[],
        top_p=1.0,
        top_logprobs=0,
        metadata={},
    )


def put(store: ResponseStore, name: str, text: str = "x" * 1000) -> None:
    store.put(make_response(name, text), [ChatMessage("user", "Hello"), ChatMessage("assistant", text)])


def test_the_least_recently_used_response_is_dropped() -> None:
    store = ResponseStore(12_000)
    for name in "abc":
        put(store, name)
    assert store.get("resp_a")
    put(store, "d")
    assert [name for name in "abcd" if store.get(f"resp_{name}")] == ["a", "c", "d"]
    assert store.find_item("msg_b") is None
    assert store.size <= 12_000


def test_a_response_and_its_items_are_found_until_deleted() -> None:
    store = ResponseStore()
    put(store, "a", "text")
    entry = store.get("resp_a")
    assert entry is not None
    assert msgspec.json.decode(entry.body, type=ResponseObject) == make_response("a", "text")
    assert entry.messages == [ChatMessage("user", "Hello"), ChatMessage("assistant", "text")]
    item = store.find_item("msg_a")
    assert item is not None
    assert (item["type"], item["content"][0]["text"]) == ("message", "text")
    assert store.delete("resp_a")
    assert not store.delete("resp_a")
    assert (store.get("resp_a"), store.find_item("msg_a"), store.size) == (None, None, 0)


def test_a_response_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(5000)
    put(store, "a", "x" * 5000)
    assert (store.get("resp_a"), store.size) == (None, 0)
