"""The KV caches of all sessions: one pool per shape of a cache, and prefixes that texts of one pool share.

Everything here belongs to the scheduler's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import torch

from cloud_verifier.engine.sessions import Session
from cloud_verifier.model.kv_cache import CachePool, CacheShape
from cloud_verifier.model.prefix_cache import CacheScope, PrefixCache
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from edge_runtime.common.memory import release_freed_memory
from edge_runtime.protocol.errors import TargetError


class SessionCaches:
    """Makes the pools, and gives the memory of closed sessions back to them.

    Args:
        capacity_tokens: capacity of each pool in tokens, all sessions together; may be set until the first is made.
        reuse_prefixes: let new sessions begin with the KV caches of others that have a prefix in common with them.
    """

    def __init__(self, capacity_tokens: int, *, reuse_prefixes: bool) -> None:
        self.capacity_tokens = capacity_tokens
        self._reuse_prefixes = reuse_prefixes
        # By shape of the KV cache, and whether the pool is the draft model's.
        self._pools: dict[tuple[CacheShape, bool], CachePool] = {}
        # Of the targets' pools; empty if prefixes are not reused.
        self._prefix_caches: dict[CacheShape, PrefixCache] = {}
        self._released: deque[Session] = deque()

    @property
    def pools(self) -> list[CachePool]:
        return list(self._pools.values())

    @property
    def retained_tokens(self) -> int:
        """Tokens of closed sessions that are kept for reuse. Any thread may ask."""
        return sum(cache.retained_tokens for cache in list(self._prefix_caches.values()))

    @property
    def evictions(self) -> int:
        """Closed sessions whose caches were given up because a pool needed the memory. Any thread may ask."""
        return sum(cache.evictions for cache in list(self._prefix_caches.values()))

    def pool(self, shape: CacheShape, *, for_draft: bool = False) -> CachePool:
        """Return the pool of a shape, made on first use.

        Raises:
            TargetError: the device has no memory for it.
        """
        if (shape, for_draft) not in self._pools:
            try:
                self._pools[shape, for_draft] = shape.make_pool(self.capacity_tokens)
            except torch.OutOfMemoryError:
                gibibytes = self.capacity_tokens * shape.bytes_per_token / 2**30
                raise TargetError(
                    f"the KV cache of {self.capacity_tokens} tokens takes {gibibytes:.1f} GiB, which {shape.device} "
                    "does not have in addition to the target; lower --max-tokens"
                ) from None
            if self._reuse_prefixes and not for_draft:
                self._prefix_caches[shape] = PrefixCache(self._pools[shape, for_draft])
        return self._pools[shape, for_draft]

    def begin(self, session: Session) -> bool:
        """Let the cache of a new session begin with a cached prefix.

        Returns whether its round may go on; otherwise a longer prefix is about to be cached, and it should try again.
        """
        target = session.target
        # The pool may have to be made first, and the prefix cache with it.
        self.pool(target.runner.shape)
        prefix_cache = self._prefix_caches.get(target.runner.shape)
        if prefix_cache is None:
            return True
        target.prepare_cache(session.cache, len(session.ids))
        length = prefix_cache.open(CacheScope(session.owner, target), session.ids, session.cache)
        session.cached_tokens = length or 0
        return length is not None

    def keep(self, session: Session, rows: list[int]) -> None:
        """Keep these rows of the last forward in a session's cache, see `CachePool.keep`."""
        self.pool(session.target.runner.shape).keep(session.cache, rows)

    def forget(self, session: Session) -> None:
        """Share nothing of a session's cache, which may hold an incomplete round."""
        if prefix_cache := self._prefix_caches.get(session.target.runner.shape):
            prefix_cache.forget(session.cache)

    @property
    def has_released(self) -> bool:
        """Whether `free_released` has anything to do."""
        return bool(self._released)

    def release(self, session: Session) -> None:
        """Free a closed session's cache, or keep it for reuse, at the next `free_released`. Any thread may call."""
        self._released.append(session)

    def free_released(self, busy: Collection[Session], speculation: Speculation | None) -> None:
        """Free the pages of released sessions, except those that have a round running.

        Args:
            busy: sessions with a round running.
            speculation: the verifier's own draft model, which has caches of its own.
        """
        for _ in range(len(self._released)):
            session = self._released.popleft()
            if session in busy:
                self._released.append(session)
                continue
            pool = self.pool(session.target.runner.shape)
            prefix_cache = self._prefix_caches.get(session.target.runner.shape)
            (prefix_cache.close if prefix_cache else pool.release)(session.cache)
            draft, session.draft = session.draft, None
            if draft:
                draft.close()
            if draft and draft.cached_sequence and speculation and speculation.runner:
                self.pool(speculation.runner.shape, for_draft=True).release(draft.cached_sequence)

    def remove(self, target: Target, *, last_of_shape: bool) -> None:
        """Give up what is cached of an unloaded target.

        Args:
            last_of_shape: no other target has caches of this shape, so that the pool is dropped as well.
        """
        shape = target.runner.shape
        if shape in self._prefix_caches:
            self._prefix_caches[shape].purge(target)
        if last_of_shape:
            self._pools.pop((shape, False), None)
            self._prefix_caches.pop(shape, None)

    def shrink(self, idle_seconds: float) -> None:
        """Give memory that a peak has left behind back to the system.

        Args:
            idle_seconds: how long caches of closed sessions are kept for reuse, where that takes memory.
        """
        for prefix_cache in self._prefix_caches.values():
            prefix_cache.expire(idle_seconds)
        for pool in self._pools.values():
            pool.trim()
        release_freed_memory()
