"""The frozen draft model on the board: loads a bundle and drafts tokens, with rollback to any earlier length.

`OnnxDraft` holds what all requests share (weights, tokenizer, manifest). `DraftContext` holds what belongs to one text
(token ids, KV cache, tokens drafted ahead); it must be used by one thread at a time.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnxruntime as ort
import psutil
from tokenizers import Tokenizer

from edge_runtime.common.memory import release_freed_memory
from edge_runtime.draft.onnx_files import check_external_files
from edge_runtime.draft.onnx_runner import Logits, detect_graph_kind, logits_width, make_runner
from edge_runtime.draft.prefix_cache import DEFAULT_PREFIX_CACHE_BYTES, DraftPrefixCache
from edge_runtime.draft.sampler import DraftSampler
from edge_runtime.planning.plan import Plan, apply_stop_rule
from edge_runtime.planning.round_rules import PREFILL_CHUNK_TOKENS
from edge_runtime.protocol.bundle import Bundle, Manifest, read_bundle, read_chat_format, read_head_ids
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, ContextOverflow, DraftError, GrammarError
from edge_runtime.protocol.grammar_trial import TriedGrammarCompiler
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.sampling import Sampling, common_prefix_length, hash_counters

log = logging.getLogger(__name__)


class DraftToken(NamedTuple):
    """The draft's output for one position.

    Attributes:
        token: the drafted id, drawn with the shared noise.
        siblings: the runner-up ids by coupled score, best first.
        confidence: the draft's probability of `token`.
    """

    token: int
    siblings: list[int]
    confidence: float


class Proposal(msgspec.Struct, frozen=True):
    """Draft tokens for consecutive positions.

    Attributes:
        tokens: at most K ids; fewer if drafting stopped early or the draft's context is full.
        siblings: alternatives to the draft token, by index into `tokens`.
        confidences: the draft's probability of each token.
        drafted_ahead: how many of the tokens had been drafted before this call.
        survival: probability that all tokens are accepted, by the plan's calibration.
    """

    tokens: list[int]
    siblings: dict[int, list[int]]
    confidences: list[float]
    drafted_ahead: int = 0
    survival: float = 1.0

    def truncate(self, count: int) -> Proposal:
        """Return the first `count` tokens with their siblings; `survival` stays that of the whole proposal."""
        siblings = {index: ids for index, ids in self.siblings.items() if index < count}
        drafted_ahead = min(self.drafted_ahead, count)
        return Proposal(self.tokens[:count], siblings, self.confidences[:count], drafted_ahead, self.survival)

    def limit_nodes(self, max_nodes: int) -> Proposal:
        """Drop the siblings of the last positions until tokens and siblings together are at most `max_nodes`."""
        remaining = max_nodes - len(self.tokens)
        siblings = {}
        for index, ids in self.siblings.items():
            remaining -= len(ids)
            if remaining >= 0:
                siblings[index] = ids
        return msgspec.structs.replace(self, siblings=siblings)


EMPTY_PROPOSAL = Proposal([], {}, [])
# No siblings, and drafting never stops early.
PLAIN_PLAN = Plan(1)
# `OnnxDraft.measure_speed` prefills this many tokens at once, then decodes this many one by one. Chosen: milliseconds
# to tenths of a second in total.
MEASURED_PREFILL_TOKENS = 32
MEASURED_DECODE_STEPS = 5


class OnnxDraft:
    """A loaded draft model: weights, tokenizer and manifest. Shared by all requests; each has its own `DraftContext`.

    Attributes:
        tokenizer: the tokenizer that the draft and its targets share.
        threads: CPU threads of a step.
        run_seconds: time spent in onnxruntime since loading.
        prefix_cache: KV caches of texts that have ended.
        grammars: compiles grammars for the draft.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES) -> None:
        """Load the graph and the tokenizer of `bundle`.

        Args:
            threads: CPU threads of a step; 0 takes one per physical core, at most 4.
            prefix_cache_bytes: memory for KV caches of texts that have ended.

        Raises:
            DraftError: onnxruntime or tokenizers cannot read the files.
            BundleCorrupt: the graph does not match the manifest, or reads files that the manifest does not name.
        """
        options = ort.SessionOptions()
        self.threads = threads or min(4, psutil.cpu_count(logical=False) or 1)
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Threads that spin between steps save microseconds and drain the battery.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # Whatever the file is called: onnxruntime's own format names its files elsewhere.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            check_external_files(bundle)
            self.session = ort.InferenceSession(str(bundle.graph_path), options, providers=["CPUExecutionProvider"])
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
            release_freed_memory()
        except BundleError:
            raise
        except Exception as error:  # both libraries raise bare Exception subclasses of their own
            raise DraftError(f"the draft in {bundle.path} does not load: {error}; copy the bundle again") from error
        kind = detect_graph_kind(self.session)
        if kind != bundle.manifest.graph.kind:
            raise BundleCorrupt(
                f"{bundle.graph_path} is a {kind} graph, but its manifest says {bundle.manifest.graph.kind}: "
                "export the bundle again"
            )
        self.manifest: Manifest = bundle.manifest
        self.run_seconds = 0.0
        self.prefix_cache = DraftPrefixCache(prefix_cache_bytes)
        # Start time of each step in progress, by id of its context.
        self._step_starts: dict[int, float] = {}
        self._head_ids = read_head_ids(bundle)
        size = bundle.manifest.architecture.vocabulary_size
        ids = np.arange(size) if self._head_ids is None else self._head_ids
        width = logits_width(self.session)
        if width not in (len(ids), None):
            raise BundleCorrupt(
                f"{bundle.graph_path} has logits of {width} ids, but its manifest says {len(ids)}: "
                "export the bundle again"
            )
        self._hash_counters = hash_counters(ids)
        self.grammars = TriedGrammarCompiler(lambda: self.tokenizer, size, _end_ids(bundle))

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int = 0,
        verify: bool = True,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
    ) -> OnnxDraft:
        """Read, check and load the bundle at `path`. Raises BundleError and DraftError."""
        return cls(read_bundle(path, verify=verify), threads, prefix_cache_bytes)

    @property
    def step_seconds(self) -> float:
        """Age of the oldest step in progress; 0 if none is. Thread-safe."""
        starts = list(self._step_starts.values())
        return time.perf_counter() - min(starts) if starts else 0.0

    def begin_step(self, context_id: int) -> None:
        """Record that a context enters onnxruntime; each context runs one step at a time."""
        self._step_starts[context_id] = time.perf_counter()

    def end_step(self, context_id: int) -> None:
        """Record that the step of a context has ended, successfully or not."""
        self.run_seconds += time.perf_counter() - self._step_starts.pop(context_id)

    def measure_speed(self) -> tuple[float, float]:
        """Measure the draft on this machine: (seconds per decode step on a short text, seconds per prefilled token).

        Runs fewer than ten steps: milliseconds to tenths of a second. Raises DraftError.
        """
        context = self.new_context()
        times = []
        # The first run only warms up.
        for ids in ([1], [1] * MEASURED_PREFILL_TOKENS, *[[1]] * MEASURED_DECODE_STEPS):
            started = time.perf_counter()
            context.prefill(ids)
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:]), times[1] / MEASURED_PREFILL_TOKENS

    def new_context(self) -> DraftContext:
        """Create an empty context for one text."""
        return DraftContext(self, DraftSampler(self._hash_counters, self._head_ids))


class DraftContext:
    """The draft's state for one text: token ids, KV cache, and tokens drafted ahead. Not thread-safe.

    The context may hold draft tokens beyond the text. If the text then continues with exactly these ids, the tokens
    that were drafted after them are reused and not computed again.

    Attributes:
        limit: longest text in tokens.
    """

    def __init__(self, draft: OnnxDraft, sampler: DraftSampler) -> None:
        self._draft = draft
        self._sampler = sampler
        self.limit = draft.manifest.architecture.context
        self._owner = ""
        self._runner = make_runner(draft.session, draft.manifest.architecture)
        self._ids: list[int] = []
        # Logits after the last id; None after a rollback.
        self._logits: Logits | None = None
        # Draft tokens for consecutive positions from `_first_position`; each was drafted after `_ids` up to its
        # position.
        self._first_position = 0
        self._drafted: list[DraftToken] = []

    @property
    def ids(self) -> list[int]:
        """Copy of the ids in the KV cache."""
        return list(self._ids)

    def reuse_prefix(self, ids: list[int], owner: str = "") -> None:
        """Let the context, still empty, begin with the longest prefix of `ids` that a closed context has left.

        Args:
            owner: to whom the text belongs; prefixes of texts of others are not used.
        """
        self._owner = owner
        if cached := self._draft.prefix_cache.take(ids, owner):
            self._runner, self._ids = cached.runner, cached.ids

    def close(self) -> None:
        """Leave the KV cache to contexts of other texts. The context must not be used afterwards."""
        self._draft.prefix_cache.keep(self._runner, self._ids, self._owner)

    def prefill(self, ids: list[int]) -> None:
        """Append `ids` to the context.

        Raises:
            ContextOverflow: the text would be longer than the draft's context; the context is unchanged.
            DraftError: onnxruntime failed.
        """
        if ids:
            start = len(self._ids)
            self._forward(ids)
            # The text now decides these positions: their draft tokens are obsolete, and so are all that follow others.
            drafted = [drafted.token for drafted in self._drafted[start - self._first_position :][: len(ids)]]
            if start < self._first_position or drafted != ids[: len(drafted)]:
                self._drafted = []
            self._drop_drafted_before(len(self._ids))

    def rollback(self, length: int) -> None:
        """Drop all ids after the first `length`; on the fused graph this copies nothing."""
        if not 0 <= length <= len(self._ids):
            raise ValueError(f"cannot roll back to {length}: the text has {len(self._ids)} tokens")
        if length < len(self._ids):
            self._runner.truncate(length)
            del self._ids[length:]
            self._logits = None
            del self._drafted[max(0, length + 1 - self._first_position) :]

    def sync_to(self, ids: list[int], should_stop: Callable[[], bool] = bool) -> None:
        """Make the context begin with `ids`: roll back to the common prefix and prefill the rest.

        If `ids` is a prefix of the context, the context has drafted ahead and keeps the rest. `should_stop` is called
        before every prefill chunk; True leaves the rest of `ids` out.
        """
        self._check_length(len(ids))
        common = common_prefix_length(self._ids, ids)
        if common < len(ids):
            self.rollback(common)
        while len(self._ids) < len(ids) and not should_stop():
            self.prefill(ids[len(self._ids) :][:PREFILL_CHUNK_TOKENS])

    def tokens_to_prefill(self, ids: list[int]) -> int:
        """Return how many tokens `sync_to(ids)` would have to prefill."""
        return len(ids) - common_prefix_length(self._ids, ids)

    def tokens_drafted_ahead(self, ids: list[int]) -> int:
        """Return how many tokens after `ids` are drafted already."""
        known = len(self._drafted) - (len(ids) - self._first_position)
        return known if 0 < known <= len(self._drafted) and common_prefix_length(self._ids, ids) == len(ids) else 0

    def propose(
        self,
        ids: list[int],
        count: int,
        sampling: Sampling,
        plan: Plan = PLAIN_PLAN,
        *,
        processor: SequenceProcessor | None = None,
        survival: float = 1.0,
        should_stop: Callable[[], bool] = bool,
    ) -> Proposal:
        """Draft up to `count` tokens after `ids`; the context then holds all of them but the last.

        Args:
            ids: the text, at least one token; see `sync_to`.
            sampling: the target's sampling parameters: the draft draws with the same noise.
            plan: gives siblings and stop rule.
            processor: processes the draft's logits as the target's; None if `sampling` leaves them as they are. A token
                that its grammar forces costs no step of the draft.
            survival: probability that `ids` itself is accepted, if it ends in draft tokens.
            should_stop: called before every step of the draft; True ends the proposal there.

        Raises:
            ContextOverflow: `ids` is longer than the draft's context.
            DraftError: `ids` is empty, or onnxruntime failed.
        """
        if not ids:
            raise DraftError("nothing to continue: the text is empty")
        self.sync_to(ids)
        tokens: list[int] = []
        sibling_ids: dict[int, list[int]] = {}
        confidences: list[float] = []
        drafted_ahead = 0
        self._drop_drafted_before(len(ids))
        # The token after the last one that fits into the context can still be drafted, hence + 1.
        for position in range(len(ids), min(len(ids) + count, self.limit + 1)):
            index = position - len(ids)
            if index < len(self._drafted):
                drafted_ahead += 1
            elif should_stop():
                break
            else:
                try:
                    if processor and (forced := processor.forced_after(ids + tokens, 1)):
                        drafted = DraftToken(forced[0], [], 1.0)
                    else:
                        drafted = self._draft_token(position, tokens, sampling, plan.siblings, processor)
                except GrammarError as error:
                    # The target decides whether the text can go on.
                    log.debug("drafting ends: %s", error)
                    break
                self._drafted.append(drafted)
            drafted = self._drafted[index]
            tokens.append(drafted.token)
            confidences.append(drafted.confidence)
            if plan.siblings and drafted.siblings and drafted.confidence <= plan.sibling_confidence:
                sibling_ids[index] = drafted.siblings[: plan.siblings]
            survival, stop = apply_stop_rule(plan, survival, drafted.confidence)
            if stop:
                break
        return Proposal(tokens, sibling_ids, confidences, drafted_ahead, survival)

    def propose_next(
        self, ids: list[int], sampling: Sampling, siblings: int = 0, *, processor: SequenceProcessor | None = None
    ) -> Proposal:
        """Draft the token after `ids` with `siblings` alternatives, however sure of it the draft is; see `propose`."""
        return self.propose(ids, 1, sampling, Plan(1, siblings=siblings, sibling_confidence=1.0), processor=processor)

    def precompute_noise(self, start: int, count: int, sampling: Sampling) -> None:
        """Compute the noise for `count` positions from `start` on; it does not depend on the text."""
        self._sampler.precompute_noise(sampling, range(start, start + count))

    def _draft_token(
        self,
        position: int,
        tokens: list[int],
        sampling: Sampling,
        siblings: int,
        processor: SequenceProcessor | None,
    ) -> DraftToken:
        """Draft the token at `position`; `tokens` are the draft tokens before it."""
        if len(self._ids) < position:
            self._forward(tokens[len(self._ids) - position :])
        elif len(self._ids) > position or self._logits is None:
            # The logits of this position are gone: compute them again from the last id before it.
            last = self._ids[position - 1]
            self.rollback(position - 1)
            self._forward([last])
        assert self._logits is not None
        changes = processor.changes_after(self._ids) if processor else None
        (token, *others), confidence = self._sampler.sample(
            self._logits, sampling, position, 1 + siblings, changes=changes
        )
        return DraftToken(token, others, confidence)

    def _forward(self, ids: list[int]) -> None:
        self._check_length(len(self._ids) + len(ids))
        self._draft.begin_step(id(self))
        try:
            # A token that was added to the target after the draft was made has no embedding: read the last one instead,
            # which costs nothing but the acceptance of what follows.
            largest = self._draft.manifest.architecture.vocabulary_size - 1
            self._logits = self._runner.append([min(token, largest) for token in ids])
        except Exception as error:  # onnxruntime's exceptions share no base class
            self._runner.truncate(len(self._ids))
            self._logits = None
            raise DraftError(f"the draft failed at position {len(self._ids)}: {error}") from error
        finally:
            self._draft.end_step(id(self))
        self._ids += ids

    def _drop_drafted_before(self, position: int) -> None:
        """Drop the draft tokens for positions before `position`."""
        passed = position - self._first_position
        self._drafted = self._drafted[passed:] if 0 <= passed <= len(self._drafted) else []
        self._first_position = position

    def _check_length(self, length: int) -> None:
        if length > self.limit:
            raise ContextOverflow(
                f"{length} tokens are more than the draft's context of {self.limit}; "
                "shorten the prompt, or decode in the cloud alone (--num-assistant-tokens 0)"
            )


def _end_ids(bundle: Bundle) -> list[int]:
    """The tokens that may end a text, as far as the bundle says: the chat format's, else all special tokens."""
    special_ids = bundle.manifest.vocabulary.special_ids
    end = read_chat_format(bundle).special_tokens.get("eos_token")
    return [special_ids[end]] if isinstance(end, str) and end in special_ids else list(special_ids.values())
