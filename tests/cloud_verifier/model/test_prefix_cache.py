"""The prefix cache and the pages of its pool: what is shared, copied, kept and released, in any order of events."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TypeAlias

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cloud_verifier.model import kv_cache
from cloud_verifier.model.kv_cache import CachedSequence, KVCacheFull, KVCachePool, KVCacheShape
from cloud_verifier.model.prefix_cache import CacheScope, PrefixCache
from cloud_verifier.model.rope import LengthScaledRope
from cloud_verifier.model.target import Target

# Pages are small, so that short texts have several.
PAGE = 4
CAPACITY_PAGES = 24
# Tokens that are written by rejected drafts; no text has them.
GARBAGE = -1.0

Pages: TypeAlias = dict[tuple[int, int], float]


def make_target() -> Target:
    """A target whose keys depend on the tokens before them and on the set of frequencies. It has no model."""
    target, rope = object.__new__(Target), object.__new__(LengthScaledRope)
    rope.recomputes = True
    target._rope = rope
    return target


def make_pool(device: str) -> KVCachePool:
    """A pool of small pages. On the `meta` device it allocates like an accelerator and has no contents."""
    pool = KVCachePool(KVCacheShape(1, 1, 1, torch.float32, torch.device(device)), 0)
    pool.page_tokens = PAGE
    pool.capacity_pages = CAPACITY_PAGES
    pool.slabs, pool._free = [], []
    if pool.preallocated:
        pool.slabs = [pool._allocate(CAPACITY_PAGES + 1)]
        pool._free = list(range(CAPACITY_PAGES, 0, -1))
    return pool


def row_contents(sequence: CachedSequence, token: float) -> float:
    return token + 10.0 * sequence.long_rope


class PoolMachine(RuleBasedStateMachine):
    """Sessions open, write, roll back, close and fail; the contents of every cached token are checked after each step.

    The contents of a row are the token that it belongs to, and the set of frequencies that its key has. On a CPU they
    are in the pool; on the `meta` device they are tracked here, and only whole pages are shared.
    """

    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(self.device)
        self.cache = PrefixCache(self.pool)
        self.targets = [make_target(), make_target()]
        self.contents: Pages = {}
        # Sessions in the order of their openings: their texts, by cache.
        self.ids: dict[CachedSequence, list[int]] = {}
        self.scopes: dict[CachedSequence, CacheScope] = {}
        self.waiting: dict[CachedSequence, CacheScope] = {}

    # Contents

    @torch.inference_mode()
    def write(self, sequence: CachedSequence, position: int, token: float) -> None:
        page, row = sequence.pages[position // PAGE], position % PAGE
        token = row_contents(sequence, token)
        if self.device == "cpu":
            self.pool.view(page)[..., row, :] = token
        else:
            self.contents[page, row] = token

    def read(self, sequence: CachedSequence) -> list[float]:
        locations = [(sequence.pages[i // PAGE], i % PAGE) for i in range(sequence.length)]
        if self.device == "cpu":
            return [float(self.pool.view(page)[0, 0, 0, row, 0]) for page, row in locations]
        return [self.contents[location] for location in locations]

    def apply_moves(self) -> None:
        if self.device == "cpu":
            self.pool.apply_moves()
        else:
            for from_page, from_row, to_page, to_row in self.pool.take_moves():
                self.contents[to_page, to_row] = self.contents[from_page, from_row]

    def append(self, sequence: CachedSequence, tokens: list[float], rows: list[int]) -> bool:
        """What a forward does: move what was kept before, write after the sequence, and keep some of the rows."""
        if self.device == "cpu":
            self.apply_moves()
        try:
            self.pool.reserve(sequence, sequence.length + len(tokens))
        except KVCacheFull:
            assert self.pool.used_pages <= CAPACITY_PAGES
            assert not self.cache._retained, "it is full only without anything to give up"
            return False
        self.apply_moves()
        for index, token in enumerate(tokens):
            self.write(sequence, sequence.length + index, token)
        self.pool.keep(sequence, rows)
        return True

    def begin(self, ids: list[int], scope: CacheScope, long_rope: bool) -> None:
        sequence = CachedSequence()
        sequence.long_rope = long_rope
        self.ids[sequence] = ids
        self.scopes[sequence] = self.waiting[sequence] = scope
        self.open_again(sequence)

    def open_again(self, sequence: CachedSequence) -> None:
        length = self.cache.open(self.waiting[sequence], self.ids[sequence], sequence)
        if length is not None:
            assert length == sequence.length < len(self.ids[sequence])
            assert self.device == "cpu" or length % PAGE == 0
            del self.waiting[sequence]

    def pick(self, data: st.DataObject, *, ready: bool = True) -> CachedSequence | None:
        sequences = [sequence for sequence in self.ids if not ready or sequence not in self.waiting]
        return data.draw(st.sampled_from(sequences)) if sequences else None

    # Events

    @rule(
        ids=st.lists(st.integers(1, 2), min_size=1, max_size=22),
        owner=st.sampled_from(["a", "b"]),
        version=st.integers(0, 1),
        long_rope=st.booleans(),
    )
    def open(self, ids: list[int], owner: str, version: int, long_rope: bool) -> None:
        self.begin(ids, CacheScope(owner, self.targets[version]), long_rope)

    @rule(data=st.data())
    def open_a_text_that_continues_another(self, data: st.DataObject) -> None:
        if sequence := self.pick(data, ready=False):
            start = data.draw(st.integers(1, len(self.ids[sequence])))
            ids = self.ids[sequence][:start] + data.draw(st.lists(st.integers(1, 2), max_size=6))
            self.begin(ids, self.scopes[sequence], sequence.long_rope)

    @rule(data=st.data(), count=st.integers(1, 9))
    def prefill(self, data: st.DataObject, count: int) -> None:
        if sequence := self.pick(data):
            chunk = self.ids[sequence][sequence.length : -1][:count]
            self.append(sequence, list(map(float, chunk)), list(range(len(chunk))))

    @rule(data=st.data(), draft=st.lists(st.integers(1, 2), max_size=6), kept=st.integers(0, 6), sibling=st.booleans())
    def verify(self, data: st.DataObject, draft: list[int], kept: int, sibling: bool) -> None:
        sequence = self.pick(data)
        if sequence is None or sequence.length < len(self.ids[sequence]) - 1:
            return
        ids, kept = self.ids[sequence], min(kept, len(draft))
        accepted = draft[:kept]
        tokens = [ids[-1], *accepted, *[GARBAGE] * (len(draft) - kept)]
        rows = list(range(1 + kept))
        if sibling:
            # The rejected token's sibling is the last row.
            tokens.append(1.0)
            rows.append(len(tokens) - 1)
            accepted = [*accepted, 1]
        if self.append(sequence, list(map(float, tokens)), rows):
            ids += [*accepted, data.draw(st.integers(1, 2))]

    @rule(data=st.data())
    def drop_all_keys(self, data: st.DataObject) -> None:
        """The text outgrew its RoPE frequencies; see `Target.prepare_cache`."""
        if sequence := self.pick(data):
            sequence.length, sequence.long_rope = 0, not sequence.long_rope

    @rule(data=st.data(), fails=st.booleans(), twice=st.booleans())
    def close(self, data: st.DataObject, fails: bool, twice: bool) -> None:
        if sequence := self.pick(data, ready=False):
            if fails:
                self.cache.forget(sequence)
            for _ in range(1 + twice):
                self.cache.close(sequence)
            assert not fails or sequence not in self.cache._retained
            del self.ids[sequence]
            self.waiting.pop(sequence, None)

    @rule()
    def trim(self) -> None:
        """Twice without a need for them in between, and no free page of a CPU has memory."""
        self.pool.trim()
        free = [] if self.pool.preallocated else list(self.pool._free)
        self.pool.trim()
        assert not any(self.pool.slabs[page].numel() for page in free)

    @rule()
    def expire(self) -> None:
        self.cache.expire(300.0)
        retained = self.cache.retained_tokens
        self.cache.expire(-1.0)
        assert self.cache.retained_tokens == (retained if self.pool.preallocated else 0)

    @rule(version=st.integers(0, 1))
    def unload(self, version: int) -> None:
        self.cache.purge(self.targets[version])
        assert all(entry.scope.target is not self.targets[version] for entry in self.cache._retained.values())

    @rule()
    def reclaim(self) -> None:
        before = len(self.cache._retained)
        assert self.pool.reclaim() is (before > 0)
        assert len(self.cache._retained) == max(0, before - 1)

    @invariant()
    def waiting_sessions_get_their_turn(self) -> None:
        for sequence in list(self.waiting):
            self.open_again(sequence)

    @invariant()
    def every_cached_token_is_where_it_should_be(self) -> None:
        self.apply_moves()
        for sequence, ids in self.ids.items():
            assert self.read(sequence) == [row_contents(sequence, token) for token in ids[: sequence.length]]
        for sequence, entry in self.cache._retained.items():
            assert self.read(sequence) == [row_contents(sequence, token) for token in entry.ids]
            assert sequence.length == len(entry.ids)

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        pool = self.pool
        holders = Counter(page for sequence in (*self.ids, *self.cache._retained) for page in sequence.pages)
        assert holders == pool._holders
        free = [*pool._free, *pool._given_back]
        assert len(set(free)) == len(free)
        assert not holders.keys() & set(free)
        total = CAPACITY_PAGES if pool.preallocated else len(pool.slabs)
        assert len(holders) + len(free) == total
        if len(holders) > CAPACITY_PAGES:
            assert self.device == "cpu"

    @invariant()
    def scopes_and_counters_agree(self) -> None:
        cache = self.cache
        assert cache.retained_tokens == sum(len(entry.ids) for entry in cache._retained.values())
        entries = [entry for entries in cache._by_scope.values() for entry in entries.values()]
        assert set(map(id, entries)) == set(map(id, (*cache._live.values(), *cache._retained.values())))
        assert all(cache._by_scope.values())

    def teardown(self) -> None:
        for sequence in list(self.ids):
            self.cache.close(sequence)
        while self.pool.reclaim():
            pass
        assert self.pool.used_pages == 0


class AcceleratorPoolMachine(PoolMachine):
    device = "meta"


MACHINE_SETTINGS = settings(max_examples=25, stateful_step_count=40)
TestPool = PoolMachine.TestCase
TestAcceleratorPool = AcceleratorPoolMachine.TestCase
TestPool.settings = TestAcceleratorPool.settings = MACHINE_SETTINGS


def fill(pool: KVCachePool, sequence: CachedSequence, length: int) -> None:
    pool.reserve(sequence, length)
    pool.keep(sequence, list(range(length - sequence.length)))


def open_and_fill(cache: PrefixCache, pool: KVCachePool, scope: CacheScope, ids: list[int]) -> CachedSequence:
    """A session whose ids are cached, except the last."""
    sequence = CachedSequence()
    assert cache.open(scope, ids, sequence) is not None
    fill(pool, sequence, len(ids) - 1)
    return sequence


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_prefix_is_taken_within_its_scope_only(device: str) -> None:
    pool = make_pool(device)
    cache, target = PrefixCache(pool), make_target()
    ids = list(range(1, 19))
    cache.close(open_and_fill(cache, pool, CacheScope("a", target), ids))
    retained = 17 if device == "cpu" else 16
    assert cache.retained_tokens == retained
    for scope, length in (
        (CacheScope("b", target), 0),
        (CacheScope("a", make_target()), 0),
        (CacheScope("a", target), retained),
    ):
        assert cache.open(scope, [*ids, 5, 5], CachedSequence()) == length


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parallel_openings_wait_for_one_prefill(device: str) -> None:
    pool = make_pool(device)
    cache, scope, ids = PrefixCache(pool), CacheScope("a", make_target()), list(range(1, 18))
    sequences = [CachedSequence() for _ in range(3)]
    assert [cache.open(scope, list(ids), sequence) for sequence in sequences] == [0, None, None]
    fill(pool, sequences[0], 9)
    assert cache.open(scope, list(ids), sequences[1]) is None
    fill(pool, sequences[0], 16)
    assert [cache.open(scope, list(ids), sequence) for sequence in sequences[1:]] == [16, 16]
    assert len({*sequences[0].pages, *sequences[1].pages, *sequences[2].pages}) == 4


def test_a_session_whose_prefill_failed_is_not_waited_for() -> None:
    pool = make_pool("cpu")
    cache, scope = PrefixCache(pool), CacheScope("a", make_target())
    first, second = CachedSequence(), CachedSequence()
    assert cache.open(scope, [1, 2, 3, 4], first) == 0
    assert cache.open(scope, [1, 2, 3, 4], second) is None
    cache.forget(first)
    assert cache.open(scope, [1, 2, 3, 4], second) == 0


def test_a_longer_text_replaces_its_beginning_and_the_least_recent_goes_first() -> None:
    pool = make_pool("cpu")
    cache, scope = PrefixCache(pool), CacheScope("a", make_target())
    chats = {name: [name] * 6 for name in (1, 2, 3)}
    for ids in chats.values():
        cache.close(open_and_fill(cache, pool, scope, ids))
    # The second turn of the first chat.
    chats[1] += [4, 4, 4]
    second = CachedSequence()
    assert cache.open(scope, chats[1], second) == 5
    fill(pool, second, len(chats[1]) - 1)
    cache.close(second)
    assert [entry.ids for entry in cache._retained.values()] == [[2] * 5, [3] * 5, [1, 1, 1, 1, 1, 1, 4, 4]]
    # The same text again adds nothing.
    cache.close(open_and_fill(cache, pool, scope, chats[2]))
    assert [entry.ids[0] for entry in cache._retained.values()] == [3, 1, 2]
    pool.reclaim()
    assert [entry.ids[0] for entry in cache._retained.values()] == [1, 2]
    assert cache.evictions == 1


def test_retained_sequences_yield_to_live_ones() -> None:
    pool = make_pool("meta")
    cache, scope = PrefixCache(pool), CacheScope("a", make_target())
    for name in range(1, 7):
        cache.close(open_and_fill(cache, pool, scope, [name] * 17))
    assert pool.used_pages == CAPACITY_PAGES
    live = open_and_fill(cache, pool, scope, [7] * (4 * PAGE * 5))
    assert len(live.pages) == 20
    assert len(cache._retained) == 1
    with pytest.raises(KVCacheFull):
        pool.reserve(live, PAGE * (CAPACITY_PAGES + 1))
    assert pool.used_pages == 20
    assert cache.evictions == 6


def test_a_cpu_pool_keeps_no_more_than_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KVCacheShape(1, 1, 64, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(kv_cache, "RETENTION_MEMORY_SHARE", 0.0)
    pool = KVCachePool(shape, 1 << 20)
    cache, scope, random = PrefixCache(pool), CacheScope("", make_target()), Random(1)
    for _ in range(5):
        cache.close(open_and_fill(cache, pool, scope, [random.randrange(1000) for _ in range(100)]))
    live = open_and_fill(cache, pool, scope, [1001] * 100)
    assert pool.used_pages == len(live.pages) == 1
    assert cache.retained_tokens == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_text_that_outgrows_its_frequencies_leaves_the_pages_of_others_alone(device: str) -> None:
    pool = make_pool(device)
    cache, scope, ids = PrefixCache(pool), CacheScope("a", make_target()), list(range(1, 11))
    first, second = open_and_fill(cache, pool, scope, list(ids)), CachedSequence()
    assert cache.open(scope, list(ids), second) == (9 if device == "cpu" else 8)
    pages = list(second.pages)
    first.length, first.long_rope = 0, True
    fill(pool, first, 6)
    assert second.pages == pages
    assert not set(first.pages[:2]) & set(pages)
