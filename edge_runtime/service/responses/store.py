"""Earlier responses, which `previous_response_id` continues and `GET /v1/responses/{id}` returns."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import msgspec

from edge_runtime.service.conversation import ChatMessage
from edge_runtime.service.responses.schema import OutputItem, ResponseObject

# Chosen: some hundred conversations of a few thousand tokens, and little beside a draft model of 100 MB and more.
MAX_STORE_BYTES = 4 << 20
# Approximate memory of a response in addition to its texts, in bytes.
ENTRY_BYTES = 1024


class StoredResponse(msgspec.Struct, frozen=True):
    """A response and its conversation, both as JSON, which takes less memory than objects.

    Attributes:
        conversation: messages of input and output, of earlier responses, too; without instructions.
    """

    body: bytes
    conversation: bytes

    @property
    def messages(self) -> list[ChatMessage]:
        """The messages of the conversation."""
        return msgspec.json.decode(self.conversation, type=list[ChatMessage])

    @property
    def output(self) -> list[OutputItem]:
        """The items of the response."""
        return msgspec.json.decode(self.body, type=ResponseObject).output


class ResponseStore:
    """Keeps responses in memory, from any thread; drops the least recently used ones if they are too large together."""

    def __init__(self, max_bytes: int = MAX_STORE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, str] = {}
        self.size = 0
        self._lock = threading.RLock()

    def put(self, response: ResponseObject, messages: list[ChatMessage]) -> None:
        """Keep a response. One that is larger than the store is not kept."""
        entry = StoredResponse(msgspec.json.encode(response), msgspec.json.encode(messages))
        with self._lock:
            self._responses[response.id] = entry
            self._items |= {item.id: response.id for item in response.output}
            self.size += _size(entry)
            while self.size > self._max_bytes:
                self.delete(next(iter(self._responses)))

    def get(self, response_id: str) -> StoredResponse | None:
        """Return a response; None if it is not (or no longer) kept."""
        with self._lock:
            entry = self._responses.get(response_id)
            if entry:
                self._responses.move_to_end(response_id)
        return entry

    def delete(self, response_id: str) -> bool:
        """Drop a response; return whether it was kept."""
        with self._lock:
            entry = self._responses.pop(response_id, None)
            if entry is None:
                return False
            self.size -= _size(entry)
            for item in entry.output:
                del self._items[item.id]
        return True

    def find_item(self, item_id: str) -> dict[str, Any] | None:
        """Return an item of a response that is kept, in the form of an input item."""
        entry = self.get(self._items.get(item_id, ""))
        items: list[dict[str, Any]] = msgspec.to_builtins(entry.output) if entry else []
        return next((item for item in items if item["id"] == item_id), None)


def _size(entry: StoredResponse) -> int:
    return len(entry.body) + len(entry.conversation) + ENTRY_BYTES
