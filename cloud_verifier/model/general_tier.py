"""The general tier: models of any architecture that transformers generates with, on transformers' own cache.

The fast tier (`runner`, `fast_tier`) batches sessions over pages of keys and values. What it cannot take runs here, one
session a forward. A text is read as `generate` reads it: its prompt in one forward, then token by token. Where the
self-test shows that other ways give the same logits, they are used:

- a draft is verified in one forward. Rejected tokens are rolled back by cropping the cache, or by restoring a snapshot
  of it, after which the accepted ones are fed again with the next forward;
- otherwise (most recurrent models in transformers) a draft is verified token by token up to the first rejected one, so
  that nothing has to be rolled back.

A sibling of a draft token is verified by a forward of its own, if the target chooses it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil
import torch

from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.generation_state import CacheSnapshot, GenerationModel, GenerationState
from cloud_verifier.model.kv_cache import CachedSequence, KVCacheFull, reclaim_nothing
from cloud_verifier.model.sampling import RowSampling, SampledToken, SampledTokens
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import CoupledSampler

log = logging.getLogger(__name__)

# Rows of one forward that prefills a prompt in chunks: bounds the memory of attention scores.
PREFILL_CHUNK_ROWS = 512
# More accepted tokens than this that the cache lacks are fed in a forward of their own, before a draft is verified, so
# that a text whose drafts are rejected again and again does not feed more and more tokens again.
MAX_UNREAD_TOKENS = 8
# No bound: a prompt that the model can read only at once, and sessions of one call, which run one after the other.
UNBOUNDED = 1 << 30
# Sessions for whose fixed memory (recurrent states, windows) a pool has room, besides that of its tokens: the default
# of the verifier's limit.
POOL_SESSIONS = 256
# The share of the memory that is free when a pool is made which it may use.
POOL_MEMORY_SHARE = 0.8
# Lengths in the self-test, in tokens: a prompt, a chunk after it, and single steps after that.
PROMPT_TOKENS, CHUNK_TOKENS, STEP_TOKENS = 12, 4, 2
# The self-test looks across the borders of windows and chunks of at most this many tokens: the default chunk of
# recurrent models, and still a short forward. Across longer ones, a text is read as `generate` reads it.
MAX_TESTED_BORDER = 256
# Windows and chunks, and the number of tokens that sparse attention selects, in transformers' configurations.
_BORDERS = (
    "sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "local_attn_chunk_length",
    "chunk_size", "mamba_chunk_size", "block_size", "index_topk",
)  # fmt: skip
# By dtype: the largest difference of a logit, relative to the largest logit, that the self-test accepts as rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class GeneralCacheShape(NamedTuple):
    """What determines the memory of a model's caches in the general tier.

    Attributes:
        bytes_per_token: memory by which a cache grows with a token.
        fixed_bytes: memory of a cache that does not depend on the length of the text.
        device: where it is.
        shares_prefixes: a cache can begin with a prefix that was read as a part of another text.
    """

    bytes_per_token: int
    fixed_bytes: int
    device: torch.device
    shares_prefixes: bool = False

    def make_pool(self, tokens: int) -> GeneralCachePool:
        """A pool for caches of this shape; see `GeneralCachePool`."""
        wanted = tokens * self.bytes_per_token + POOL_SESSIONS * self.fixed_bytes
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        pool = GeneralCachePool(self, min(wanted, int(POOL_MEMORY_SHARE * free)))
        log.info("caches of all sessions together: at most %.2f GiB", pool.capacity_bytes / 2**30)
        return pool


class CachedText:
    """One session's text in a `GeneralCachePool`.

    Attributes:
        ids: accepted token ids.
        prompt_length: how many of them were read in the first forward.
        state: the model's cache of a prefix of `ids`, of which until `keep` also rows that follow; None if dropped.
        next_logits: logits after the last token in `state`, if it was read ahead of its segment.
        segment: the segment that was run last, until `keep`.
        rows: its rows that have been fed, in the order of the text.
        snapshot: the state before `rows`, if it is needed to roll them back.
        nbytes: memory of `state` when it was last measured.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.prompt_length = 0
        self.next_logits: torch.Tensor | None = None
        self.state: GenerationState | None = None
        self.segment: Segment | None = None
        self.rows: list[int] = []
        self.snapshot: CacheSnapshot | None = None
        self.nbytes = 0


class GeneralCachePool:
    """The caches of all sessions in the general tier, and a bound on their memory.

    Beyond the bound, the caches of the texts that were used least recently are dropped, those of closed sessions first.
    A text whose cache was dropped is prefilled again when its session continues; its session does not notice.

    Args:
        capacity_bytes: the bound.

    Attributes:
        used_bytes: memory of all caches; what texts share is counted in each.
        preallocated, reclaim: see `kv_cache.CachePool`.
    """

    preallocated = False

    def __init__(self, shape: GeneralCacheShape, capacity_bytes: int) -> None:
        self.shape = shape
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.reclaim: Callable[[], bool] = reclaim_nothing
        # Least recently used first.
        self._texts: OrderedDict[CachedSequence, CachedText] = OrderedDict()

    def text(self, sequence: CachedSequence) -> CachedText:
        """The text of `sequence`, marked as used."""
        text = self._texts.setdefault(sequence, CachedText())
        self._texts.move_to_end(sequence)
        return text

    def account(self, text: CachedText) -> None:
        """Measure the cache of `text`, and drop others while all together exceed the bound.

        Raises:
            KVCacheFull: this cache alone exceeds the bound.
        """
        measured = text.state.nbytes if text.state else 0
        self.used_bytes += measured - text.nbytes
        text.nbytes = measured
        while self.used_bytes > self.capacity_bytes and self.reclaim():
            pass
        for other in self._texts.values():
            if self.used_bytes <= self.capacity_bytes:
                break
            if other is not text:
                self.drop(other)
        if self.used_bytes > self.capacity_bytes:
            self.drop(text)
            raise KVCacheFull

    def drop(self, text: CachedText) -> None:
        """Free the memory of the cache of `text`. It is computed again from its ids when it is next needed."""
        self.used_bytes -= text.nbytes
        text.state, text.snapshot, text.next_logits, text.nbytes = None, None, None, 0

    def drop_all(self) -> None:
        """Free the memory of all caches."""
        for text in self._texts.values():
            self.drop(text)

    @torch.inference_mode()
    def keep(self, sequence: CachedSequence, rows: list[int]) -> None:
        """Extend the text by the given rows of the last segment, and roll back its others; see `KVCachePool.keep`."""
        text = self._texts[sequence]
        assert text.segment is not None, "nothing was run for this sequence"
        text.ids += [text.segment.ids[row] for row in rows]
        sequence.length += len(rows)
        if text.state and text.rows != rows:
            if text.state.can_crop and text.rows[: len(rows)] == rows:
                text.state.crop(len(text.ids))
            elif text.snapshot:
                text.state.restore(text.snapshot)
            else:
                self.drop(text)
        text.segment, text.rows, text.snapshot = None, [], None

    def release(self, sequence: CachedSequence) -> None:
        """Forget the text of `sequence`, which is empty afterwards."""
        text = self._texts.pop(sequence, None)
        if text is not None:
            self.drop(text)
        sequence.length = 0

    def shareable(self, source: CachedSequence, length: int) -> int:
        """See `kv_cache.CachePool.shareable`: all of a cache that can be cropped, otherwise only a whole cache."""
        text = self._texts.get(source)
        if not self.shape.shares_prefixes or text is None or text.state is None:
            return 0
        length = min(length, len(text.ids))
        if text.state.can_crop:
            return min(length, text.state.length)
        return text.state.length if text.state.length <= length else 0

    @torch.inference_mode()
    def share(self, source: CachedSequence, sequence: CachedSequence, length: int) -> None:
        """See `kv_cache.CachePool.share`.

        Raises:
            KVCacheFull: the cache of `sequence` alone exceeds the bound.
        """
        known, text = self.text(source), self.text(sequence)
        assert known.state is not None, "nothing is shareable without a cache"
        text.ids, text.state = known.ids[:length], known.state.fork(length)
        sequence.length = length
        self.account(text)

    def retain(self, sequence: CachedSequence) -> int:
        """See `kv_cache.CachePool.retain`."""
        return self.shareable(sequence, sequence.length)

    def trim(self) -> None:
        """See `kv_cache.CachePool.trim`: caches that are released are freed at once."""


class GeneralRunner:
    """Runs one model of any architecture. Several threads may use it, each with its own pool.

    Attributes:
        shape: shape of the pools that it runs with.
        max_rows, max_round_rows, max_segments, max_prefill_rows, runs_ahead, exact: see `runner.TargetRunner`.
        chunk_limit: up to this length of a text, several tokens of it are read in one forward.
        prompt_limit: tokens of a prompt that are read in the first forward: all of them, unless transformers fails.
        is_consistent: logits do not depend on where the prompt ends, so that any part of a text may be read as one.
    """

    max_rows = max_round_rows = UNBOUNDED
    max_segments = UNBOUNDED
    runs_ahead = False
    exact = False

    def __init__(self, model: Any, context: int, *, exact: bool = False) -> None:
        """
        Args:
            model: a transformers model that generates, in eval mode.
            context: longest text in tokens.
            exact: verify token by token, so that no logits depend on the draft, not even in the last bit.

        Raises:
            TargetError: transformers cannot generate with the model.
        """
        self.model = model
        self._lock = threading.Lock()
        self._config = model.config.get_text_config(decoder=True)
        self._vocabulary_size = self._config.vocab_size
        self._sampler = CoupledSampler(self._vocabulary_size)
        self._generation = GenerationModel(model, context)
        self.chunk_limit, self.is_consistent, self.prompt_limit = 0, False, UNBOUNDED
        with torch.inference_mode():
            self.shape = self._self_test(context)
        if exact:
            self.chunk_limit = 0
        self._prefills_in_chunks = self.is_consistent and self.chunk_limit >= context
        self.shape = self.shape._replace(shares_prefixes=self._prefills_in_chunks)
        self.max_prefill_rows = PREFILL_CHUNK_ROWS if self._prefills_in_chunks else UNBOUNDED

    def run(
        self,
        pool: GeneralCachePool,
        segments: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        """Run the segments one after the other; see `TargetRunner.run`.

        Of a token tree, only the rows on the target's path are sampled.

        Raises:
            KVCacheFull: the cache of one text alone exceeds the pool.
        """
        meanwhile()
        with self._lock, torch.inference_mode():
            return [self._run_segment(pool, segment) for segment in segments]

    def measure_workspace(self) -> int:
        """See `TargetRunner.measure_workspace`: pools leave memory free by `POOL_MEMORY_SHARE`."""
        return 0

    def warm_up(self, pool: GeneralCachePool) -> None:
        """Do in advance what would delay the first forwards: nothing."""

    def shut_down(self) -> None:
        """Release the followers of a tensor-parallel group: there are none."""

    def _run_segment(self, pool: GeneralCachePool, segment: Segment) -> dict[int, SampledToken] | None:
        text = pool.text(segment.sequence)
        if text.segment is not None:
            # It runs again, after another segment of the same call has failed.
            pool.keep(segment.sequence, [])
        text.segment = segment
        sampled: dict[int, SampledToken] | None = None
        try:
            if segment.sampling:
                text.prompt_length = text.prompt_length or segment.sequence.prompt_length or len(text.ids) + 1
                sampled = self._verify(text, segment, segment.sampling)
            else:
                self._prefill(text, segment)
            pool.account(text)
        except torch.OutOfMemoryError:
            pool.drop_all()
            raise KVCacheFull from None
        except BaseException:
            # The cache may hold a part of a forward.
            pool.drop(text)
            raise
        return sampled

    def _prefill(self, text: CachedText, segment: Segment) -> None:
        text.rows = list(range(len(segment)))
        if self._prefills_in_chunks:
            self._read(text, segment.ids)
        elif segment.next_id is not None:
            # As `generate` does: the first forward reads the whole prompt, the token to be scored next included.
            text.prompt_length = segment.sequence.prompt_length or len(text.ids) + len(segment) + 1
            text.next_logits = self._read(text, [*segment.ids, segment.next_id])

    def _verify(self, text: CachedText, segment: Segment, sampling: RowSampling) -> dict[int, SampledToken]:
        """Sample after the rows of a token tree that are on the target's path, from row 0."""
        # The rows of a chain attend to all rows before them; siblings do not.
        chain = [row for row, visible in enumerate(segment.visible_prefix) if row == visible]
        chain_logits = self._score_chain(text, segment, chain) if len(chain) > 1 else None
        sampled: dict[int, SampledToken] = {}
        row: int | None = 0
        while row is not None:
            if chain_logits is not None:
                scores = chain_logits[row] if row < len(chain) else self._score_sibling(text, segment, [*sampled, row])
            else:
                scores = self._read(text, [segment.ids[row]])
                text.rows.append(row)
            sampled[row] = best = sampling.sample(row, scores.cpu().numpy(), self._sampler)
            row = next(
                (
                    child
                    for child in range(1, len(segment))
                    if segment.visible_prefix[child] == row + 1 and segment.ids[child] == best.token
                ),
                None,
            )
        return sampled

    def _score_chain(self, text: CachedText, segment: Segment, chain: list[int]) -> torch.Tensor | None:
        """Read a chain of rows in one forward; return (rows, V) logits. None if it has to be read token by token."""
        state = self._state(text)
        prompt_is_read = self._prefills_in_chunks or (state.length >= text.prompt_length and text.next_logits is None)
        if not prompt_is_read or len(text.ids) + len(chain) > self.chunk_limit:
            return None
        unread = text.ids[state.length :]
        if len(unread) > MAX_UNREAD_TOKENS:
            self._read(text, [])
            unread = []
        if not state.can_crop:
            text.snapshot = state.snapshot()
        logits = state.feed([*unread, *(segment.ids[row] for row in chain)], len(chain))
        text.rows = chain
        return logits

    def _score_sibling(self, text: CachedText, segment: Segment, path: list[int]) -> torch.Tensor:
        """Roll the chain back to where `path` leaves it, and read the rest of `path`; return (V,) logits."""
        state = self._state(text)
        ids = [*text.ids, *(segment.ids[row] for row in path)]
        if state.can_crop:
            state.crop(len(ids) - 1)
        else:
            assert text.snapshot is not None
            state.restore(text.snapshot)
        text.rows = path
        return state.feed(ids[state.length :])[-1]

    def _read(self, text: CachedText, ids: list[int]) -> torch.Tensor:
        """Read the accepted tokens that the cache lacks, and `ids`; return (V,) logits after the last."""
        if text.next_logits is not None:
            # It has been read ahead of its segment.
            logits, text.next_logits = text.next_logits, None
            return logits
        state = self._state(text)
        unread = [*text.ids[state.length :], *ids]
        while True:
            if state.length + len(unread) <= self.chunk_limit and (state.length or self._prefills_in_chunks):
                count = PREFILL_CHUNK_ROWS
            elif state.length:
                count = 1
            else:
                count = min(self.prompt_limit, len(unread) if self.is_consistent else text.prompt_length)
            logits = state.feed(unread[:count])[-1]
            unread = unread[count:]
            if not unread:
                return logits

    def _state(self, text: CachedText) -> GenerationState:
        if text.state is None:
            text.state = GenerationState(self._generation)
        return text.state

    def _self_test(self, context: int) -> GeneralCacheShape:
        """Compare other ways to read a text with that of `generate`: its prompt at once, then token by token.

        Sets `chunk_limit`, `prompt_limit` and `is_consistent`.

        Raises:
            TargetError: the model's logits are not finite, or depend on other texts.
        """
        names = (getattr(self._config, name, None) for name in _BORDERS)
        borders = [size for size in names if isinstance(size, int) and 0 < size < context - 2 * PROMPT_TOKENS]
        longest = max([0, *(size for size in borders if size <= MAX_TESTED_BORDER)]) + PROMPT_TOKENS
        prompt = max(2, min(longest, context - CHUNK_TOKENS - STEP_TOKENS))
        ids = [(7 * i + 3) % self._vocabulary_size for i in range(prompt + CHUNK_TOKENS + STEP_TOKENS)]
        try:
            expected = self._read_by_token(ids, prompt)
        except Exception as error:  # whatever a model raises that reads no more than a chunk at once
            if prompt <= PROMPT_TOKENS:
                raise
            log.debug("prompts longer than %d tokens are read token by token from there: %r", PROMPT_TOKENS, error)
            prompt = self.prompt_limit = PROMPT_TOKENS
            ids = ids[: prompt + CHUNK_TOKENS + STEP_TOKENS]
            expected = self._read_by_token(ids, prompt)
        self._generation.find_module_state()
        if not expected.isfinite().all():
            raise TargetError("its logits are nan or infinite: the weights are damaged, or need another dtype")
        tolerance = TOLERANCE[self.model.dtype] * float(expected.abs().max())

        def equal(actual: torch.Tensor, reference: torch.Tensor) -> bool:
            return float((actual - reference).abs().max()) <= tolerance

        state, other = GenerationState(self._generation), GenerationState(self._generation)
        state.feed(ids[:2])
        other.feed(ids[1:PROMPT_TOKENS])
        prompt_bytes = other.nbytes
        if not equal(state.feed(ids[2:3])[-1], self._read_by_token(ids[:3], 2)[-1]):
            raise TargetError("its logits depend on other texts: it keeps a part of its cache outside of the text's")
        other.feed(ids[:1])
        token_bytes = max(0, other.nbytes - prompt_bytes)
        fixed_bytes = max(0, prompt_bytes - token_bytes * (PROMPT_TOKENS - 1))
        try:
            self.is_consistent = (
                # Its frequencies change at a length that the texts of the test do not reach.
                not self._has_longrope
                and equal(self._read_by_token(ids[:2], 1)[-1], self._read_by_token(ids[:2], 2)[-1])
                and equal(self._read_by_token(ids[:3], 2)[-1], self._read_by_token(ids[:3], 3)[-1])
                and equal(self._read_by_token(ids[:prompt], prompt - 1)[-1], expected[0])
                and equal(self._read_by_token(ids[:-1], len(ids) - 1)[-1], expected[-2])
            )
            if self.is_consistent and equal(self._read_chunk(ids, prompt), expected[1 : 2 + CHUNK_TOKENS]):
                self.chunk_limit = min((size for size in borders if size > MAX_TESTED_BORDER), default=context)
        except Exception as error:  # whatever a model raises that cannot be read otherwise
            log.debug("a text is read only as generate does: %r", error)
        return GeneralCacheShape(token_bytes, fixed_bytes, self.model.device)

    @property
    def _has_longrope(self) -> bool:
        """Whether the rotary embeddings change with the length of the text (LongRoPE, arXiv 2402.13753)."""
        return "longrope" in repr([getattr(self._config, name, None) for name in ("rope_scaling", "rope_parameters")])

    def _read_by_token(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Logits after a prompt of `prompt` tokens, which are read at once, and after each token that follows."""
        state = GenerationState(self._generation)
        return torch.stack([state.feed(part)[-1] for part in (ids[:prompt], *([token] for token in ids[prompt:]))])

    def _read_chunk(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Logits after each token of the chunk that follows the prompt, read at once, and after the next token."""
        state, end = GenerationState(self._generation), prompt + CHUNK_TOKENS
        state.feed(ids[:prompt])
        # Another chunk is read before it and rolled back.
        snapshot = state.snapshot()
        state.feed(ids[prompt:end][::-1], CHUNK_TOKENS)
        if state.can_crop:
            state.crop(prompt)
        else:
            state.restore(snapshot)
        return torch.cat([state.feed(ids[prompt:end], CHUNK_TOKENS), state.feed([ids[end]])])
