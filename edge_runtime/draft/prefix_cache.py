"""The draft's KV caches of the last texts, so that a text that begins like one of them is not prefilled again."""

from __future__ import annotations

import threading
from typing import NamedTuple

from edge_runtime.draft.onnx_runner import OnnxRunner
from edge_runtime.protocol.sampling import common_prefix_length

# Default bound of the memory. Chosen: about 7,000 tokens of the draft of SmolLM2-135M, 1,000 of a draft of 1B
# parameters.
DEFAULT_PREFIX_CACHE_BYTES = 64 << 20
# A cache is given away if the new text keeps at least this share of it, and copied otherwise. Chosen: the next turn of
# a chat takes the cache of the one before it; a new chat that only shares the system prompt leaves it where it is.
TAKEN_SHARE = 0.5


class CachedPrefix(NamedTuple):
    """A KV cache and the token ids in it.

    Attributes:
        owner: only texts of the same owner may begin with it.
    """

    runner: OnnxRunner
    ids: list[int]
    owner: str = ""


class DraftPrefixCache:
    """KV caches of texts that have ended, least recently used first, within a bound of memory. Thread-safe.

    Attributes:
        max_bytes: the bound; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_PREFIX_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: list[CachedPrefix] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used_bytes(self) -> int:
        """Memory of all caches that are kept."""
        with self._lock:
            return sum(kept.runner.nbytes for kept in self._kept)

    def take(self, ids: list[int], owner: str = "") -> CachedPrefix | None:
        """Return a KV cache of the longest known prefix of `ids`, for the caller alone; None if nothing is known."""
        with self._lock:
            own = [kept for kept in reversed(self._kept) if kept.owner == owner]
            best = max(own, key=lambda kept: common_prefix_length(kept.ids, ids), default=None)
            length = common_prefix_length(best.ids, ids) if best else 0
            if best is None or not length:
                return None
            self._kept.remove(best)
            if length < TAKEN_SHARE * len(best.ids):
                self._kept.append(best)
                return CachedPrefix(best.runner.copy_prefix(length), ids[:length], owner)
        best.runner.truncate(length)
        return CachedPrefix(best.runner, ids[:length], owner)

    def keep(self, runner: OnnxRunner, ids: list[int], owner: str = "") -> None:
        """Keep the KV cache of `ids`, which the caller does not use any more, and drop the oldest beyond the bound."""
        if not ids:
            return
        with self._lock:
            # A cache whose text is the beginning of the new one is of no further use.
            kept = [
                other
                for other in self._kept
                if other.owner != owner or common_prefix_length(other.ids, ids) < len(other.ids)
            ]
            kept.append(CachedPrefix(runner, ids, owner))
            sizes = [other.runner.nbytes for other in kept]
            while kept and sum(sizes) > self.max_bytes:
                del kept[0], sizes[0]
            self._kept = kept
