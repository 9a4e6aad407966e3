"""Items and events: the events of a stream, put together as clients do it, are the items of the whole response."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.answer import TextChange
from edge_runtime.service.responses.output_items import OutputItems
from edge_runtime.service.tool_calls.parser import CallDelta

REASONING, TEXT = TextChange("", reasoning="Hm."), TextChange("Wait.")
FIRST, SECOND = (
    TextChange("", calls=[CallDelta(0, "call_1", "now")]),
    TextChange("", calls=[CallDelta(1, "call_2", "f")]),
)
ARGUMENTS = TextChange("", calls=[CallDelta(0, arguments="{}")])


def assemble(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a stream, from its deltas."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            continue
        item = items[event["output_index"]]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "response.content_part.added":
            item["content"].append(event["part"])
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            (part,) = item["content"]
            part["text"] = part["text"][: len(part["text"]) - event.get("withdrawn", 0)] + event["delta"]
        elif kind == "response.function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "response.output_item.done":
            assert item["status"] == "in_progress"
            assert event["item"] == item | {"status": event["item"]["status"]}
            items[event["output_index"]] = event["item"]
    return items


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ([], ["message"]),
        ([TEXT, TextChange(" A"), TextChange("B.", withdrawn=1, unverified=2)], ["message"]),
        (
            [REASONING, REASONING, TEXT, FIRST, ARGUMENTS, SECOND],
            ["reasoning", "message", "function_call", "function_call"],
        ),
        ([FIRST, ARGUMENTS, TEXT], ["function_call", "message"]),
        ([TEXT, FIRST, ARGUMENTS, TEXT, SECOND], ["message", "function_call", "function_call"]),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_the_events_make_the_items(
    draft: OnnxDraft, changes: list[TextChange], kinds: list[str], complete: bool
) -> None:
    output = OutputItems(draft.tokenizer, itertools.count())
    streamed = [event for change in changes for event in output.append(change)] + output.finish(complete=complete)
    events: list[dict[str, Any]] = msgspec.to_builtins(streamed)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[dict[str, Any]] = msgspec.to_builtins(output.build())
    assert assemble(events) == items
    assert [item["type"] for item in items] == kinds
    unfinished = [item for item in items if item["status"] != "completed"]
    assert [item["status"] for item in unfinished] == ([] if complete else ["incomplete"])


def test_a_call_before_further_text_is_complete(draft: OnnxDraft) -> None:
    output = OutputItems(draft.tokenizer, itertools.count())
    for change in (TEXT, FIRST, ARGUMENTS, TEXT):
        output.append(change)
    output.finish(complete=False)
    assert [item.status for item in output.build()] == ["incomplete", "completed"]
    message = output.to_message()
    assert message.content == "Wait.Wait."
    assert message.tool_calls is not None
    assert [(call.id, call.function.name) for call in message.tool_calls] == [("call_1", "now")]
