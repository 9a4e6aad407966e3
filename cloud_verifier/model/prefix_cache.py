"""Prefix cache: KV caches of earlier texts, whose beginning a new text with the same beginning reuses.

The second turn of a chat begins with the whole first turn, and parallel answers to one prompt have all of it in common.
A prefix is taken from live sessions and from closed ones, whose caches stay in the pool until it needs their memory.
Sharing is the pool's matter (see `kv_cache`): a sequence that shares pages has the keys and values that its own prefill
would compute, so the text does not change.

Texts are shared within a scope only: one target version, whose weights made the keys and values, and one owner, since
the time to the first token tells whether a prefix was cached. Everything here belongs to the engine's thread.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from typing import NamedTuple

from cloud_verifier.model.kv_cache import CachedSequence, CachePool
from cloud_verifier.model.target import Target
from edge_runtime.protocol.sampling import common_prefix_length


class CacheScope(NamedTuple):
    """Texts of one scope may share prefixes.

    Attributes:
        owner: name of the principal; empty for anonymous requests.
        target: the loaded target version.
    """

    owner: str
    target: Target


class PrefixEntry:
    """A text whose keys and values are in the pool: of a live session, or of a closed one.

    Attributes:
        ids: its token ids; a live session appends to them.
        sequence: its KV cache, of a prefix of `ids`.
        number: entries are numbered in the order in which their sessions opened.
        used_at: when a session that used it closed or opened last, by `time.monotonic`.
    """

    def __init__(self, scope: CacheScope, ids: list[int], sequence: CachedSequence, number: int) -> None:
        self.scope = scope
        self.ids = ids
        self.sequence = sequence
        self.number = number
        self.used_at = time.monotonic()


class PrefixCache:
    """The texts of one pool.

    Attributes:
        retained_tokens: tokens of closed sessions that are kept, a shared one counted in each.
        evictions: closed sessions whose caches were given up because the pool needed memory.
    """

    def __init__(self, pool: CachePool) -> None:
        pool.reclaim = self._evict_oldest
        self.retained_tokens = 0
        self.evictions = 0
        self._pool = pool
        self._numbers = itertools.count()
        self._live: dict[CachedSequence, PrefixEntry] = {}
        # Least recently used first.
        self._retained: OrderedDict[CachedSequence, PrefixEntry] = OrderedDict()
        self._by_scope: dict[CacheScope, dict[CachedSequence, PrefixEntry]] = {}

    def open(self, scope: CacheScope, ids: list[int], sequence: CachedSequence) -> int | None:
        """Add the text of a new session, and let its cache begin with the longest prefix that is cached.

        At least the last of its ids is left to be scored.

        Args:
            ids: what the session appends to.
            sequence: its cache, still empty, after `Target.prepare_cache`.

        Returns the length of the prefix; None if a session that was opened earlier is about to prefill a longer one.
            Waiting for it saves the work: call again after the next forward.
        """
        entry = self._live.get(sequence)
        if entry is None:
            entry = self._live[sequence] = PrefixEntry(scope, ids, sequence, next(self._numbers))
            self._by_scope.setdefault(scope, {})[sequence] = entry
        limit = len(entry.ids) - 1
        source, length, expected = entry, 0, 0
        variant = entry.scope.target.key_variant(sequence)
        for other in self._by_scope[entry.scope].values():
            # One comparison rules most texts out: a longer match than `source` must also agree at the token after it.
            if other is entry or other.ids[length : length + 1] != entry.ids[length : length + 1]:
                continue
            if other.scope.target.key_variant(other.sequence) != variant:
                continue
            common = min(limit, common_prefix_length(other.ids, entry.ids))
            available = self._pool.shareable(other.sequence, min(common, other.sequence.length))
            if available > length:
                source, length = other, available
            if other.number < entry.number and other.sequence in self._live:
                expected = max(expected, self._pool.shareable(other.sequence, min(common, len(other.ids) - 1)))
        if expected > length:
            return None
        if length:
            self._pool.share(source.sequence, sequence, length)
            self._touch(source)
        return length

    def close(self, sequence: CachedSequence) -> None:
        """Keep the cache of a closed session for reuse if possible; otherwise release it."""
        if sequence in self._retained:
            return
        entry = self._live.pop(sequence, None)
        if entry is None:
            self._pool.release(sequence)
            return
        length = self._pool.retain(sequence)
        entry.ids = entry.ids[:length]
        retained = [other for other in self._by_scope[entry.scope].values() if other.sequence in self._retained]
        covering = next((other for other in retained if self._covers(other, entry)), None)
        if not length or covering:
            self._discard(entry)
            if covering:
                self._touch(covering)
            return
        for other in retained:
            if self._covers(entry, other):
                self._discard(other)
        self._retained[sequence] = entry
        self._touch(entry)
        self.retained_tokens += length

    def forget(self, sequence: CachedSequence) -> None:
        """Share nothing of a live session any more: its cache may be incomplete. `close` then releases it."""
        entry = self._live.pop(sequence, None)
        if entry is not None:
            self._remove_from_scope(entry)

    def purge(self, target: Target) -> None:
        """Release the caches of all closed sessions of a version."""
        for entry in list(self._retained.values()):
            if entry.scope.target is target:
                self._discard(entry)

    def expire(self, seconds: float) -> None:
        """Release what no session has used for `seconds`, unless that would free no memory."""
        if self._pool.preallocated:
            return
        before = time.monotonic() - seconds
        for entry in list(self._retained.values()):
            if entry.used_at > before:
                break
            self._discard(entry)

    def _covers(self, entry: PrefixEntry, other: PrefixEntry) -> bool:
        """Whether everything that could be taken from `other` can be taken from `entry`, too."""
        length = len(other.ids)
        if not length or entry.ids[length - 1 : length] != other.ids[-1:] or entry.ids[:length] != other.ids:
            return False
        key_variant = entry.scope.target.key_variant
        same_keys = key_variant(entry.sequence) == key_variant(other.sequence)
        return same_keys and self._pool.shareable(entry.sequence, length) == length

    def _evict_oldest(self) -> bool:
        """Release the least recently used cache of a closed session; return whether there was one."""
        if not self._retained:
            return False
        self._discard(next(iter(self._retained.values())))
        self.evictions += 1
        return True

    def _discard(self, entry: PrefixEntry) -> None:
        if self._retained.pop(entry.sequence, None):
            self.retained_tokens -= len(entry.ids)
        self._remove_from_scope(entry)
        self._pool.release(entry.sequence)

    def _remove_from_scope(self, entry: PrefixEntry) -> None:
        entries = self._by_scope[entry.scope]
        del entries[entry.sequence]
        if not entries:
            del self._by_scope[entry.scope]

    def _touch(self, entry: PrefixEntry) -> None:
        if entry.sequence in self._retained:
            entry.used_at = time.monotonic()
            self._retained.move_to_end(entry.sequence)
