"""The frozen draft on the board: reads a bundle, guesses the next tokens, forgets what was wrong."""

from __future__ import annotations

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

from edge_runtime.draft.onnx_runner import PREFILL_PIECE, Logits, graph_kind, logits_width, make_runner
from edge_runtime.draft.sampler import Guesser
from edge_runtime.ngram_cache.lookup import Memory, Recall
from edge_runtime.planning.plan import calibrated
from edge_runtime.protocol.bundle import Bundle, Manifest, read_bundle, read_head_ids
from edge_runtime.protocol.errors import BundleCorrupt, ContextOverflow, DraftError
from edge_runtime.protocol.sampling import Sampling, counters


class Guess(NamedTuple):
    """The draft's token for one position, as its text stood before it.

    Attributes:
        token: its choice, drawn with the shared noise.
        siblings: the next best ids by coupled score, best first.
        confidence: the draft's probability of `token`.
    """

    token: int
    siblings: list[int]
    confidence: float


class Proposal(msgspec.Struct, frozen=True):
    """Draft tokens for consecutive positions.

    Attributes:
        tokens: at most K ids; fewer where the draft stopped early or its context ended.
        siblings: for each index, the ids named beside the token there.
        confidences: the draft's probability of each token.
        ready: how many of them were known before, drafted ahead.
        survival: chance that all of them are accepted, by the plan's calibration.
    """

    tokens: list[int]
    siblings: dict[int, list[int]]
    confidences: list[float]
    ready: int = 0
    survival: float = 1.0

    def first(self, count: int) -> Proposal:
        """Its first `count` tokens."""
        siblings = {index: ids for index, ids in self.siblings.items() if index < count}
        ready = min(self.ready, count)
        return Proposal(self.tokens[:count], siblings, self.confidences[:count], ready, self.survival)

    def within(self, nodes: int) -> Proposal:
        """Without the last siblings, where there are more than `nodes` tokens and siblings."""
        left = nodes - len(self.tokens)
        siblings = {}
        for index, ids in self.siblings.items():
            left -= len(ids)
            if left >= 0:
                siblings[index] = ids
        return msgspec.structs.replace(self, siblings=siblings)


NOTHING = Proposal([], {}, [])
# What `OnnxDraft.measure` reads at once, and then token by token.
MEASURED_TOKENS = 32
MEASURED_STEPS = 5


class OnnxDraft:
    """A loaded draft: weights, tokenizer and manifest. Shared by all requests; each has its own `DraftContext`.

    Attributes:
        manifest: what the bundle says of itself.
        tokenizer: of draft and target alike.
        run_seconds: time spent in onnxruntime, over the draft's life.
    """

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """Loads the graph and the tokenizer of `bundle`.

        Args:
            threads: CPU threads of a step; 0 takes one per physical core, at most 4.

        Raises:
            DraftError: onnxruntime or tokenizers cannot read the files.
            BundleCorrupt: the graph is not what the manifest says.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or min(4, psutil.cpu_count(logical=False) or 1)
        options.inter_op_num_threads = 1
        # Threads that spin between steps would drain a battery for microseconds.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(bundle.graph_path), options, providers=["CPUExecutionProvider"])
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
        except Exception as error:  # both libraries raise bare Exception subclasses of their own
            raise DraftError(f"the draft in {bundle.path} does not load: {error}; copy the bundle again") from error
        kind = graph_kind(self.session)
        if kind != bundle.manifest.graph.kind:
            raise BundleCorrupt(
                f"{bundle.graph_path} is a {kind} graph, and its manifest says {bundle.manifest.graph.kind}: "
                "export the bundle again"
            )
        self.manifest: Manifest = bundle.manifest
        self.run_seconds = 0.0
        # When the steps in progress began, by their context.
        self._running: dict[int, float] = {}
        size = bundle.manifest.architecture.vocabulary_size
        self._head = read_head_ids(bundle)
        ids = np.arange(size) if self._head is None else self._head
        width = logits_width(self.session)
        if width not in (len(ids), None):
            raise BundleCorrupt(
                f"{bundle.graph_path} has logits of {width} ids, and its manifest says {len(ids)}: "
                "export the bundle again"
            )
        self._counters = counters(ids)

    @classmethod
    def load(cls, path: Path, *, threads: int = 0, verify: bool = True) -> OnnxDraft:
        """Reads, checks and loads the bundle at `path`. Raises BundleError and DraftError."""
        return cls(read_bundle(path, verify=verify), threads)

    @property
    def step_seconds(self) -> float:
        """How long the oldest step in progress has been at it; 0 where there is none. For any thread."""
        running = list(self._running.values())
        return time.perf_counter() - min(running) if running else 0.0

    def begin_step(self, context: int) -> None:
        """A context, one step at a time, asks onnxruntime."""
        self._running[context] = time.perf_counter()

    def end_step(self, context: int) -> None:
        """And has its answer, or an error."""
        self.run_seconds += time.perf_counter() - self._running.pop(context)

    def measure(self) -> tuple[float, float]:
        """What it costs on this machine now: seconds of a step behind a short text, and of a token read.

        Takes some ten steps, so milliseconds to tenths of a second. Raises DraftError.
        """
        context = self.context()
        times = []
        for ids in ([1], [1] * MEASURED_TOKENS, *[[1]] * MEASURED_STEPS):
            started = time.perf_counter()
            context.prefill(ids)
            times.append(time.perf_counter() - started)
        # The first run warms up.
        return statistics.median(times[2:]), times[1] / MEASURED_TOKENS

    def context(self, memory: Memory | None = None) -> DraftContext:
        """A context for one text, empty at first, whose guesses `memory` may help."""
        recall = Recall(memory, self.manifest.architecture.context) if memory else None
        return DraftContext(self, Guesser(self._counters, self._head), recall)


class DraftContext:
    """The draft's view of one text: its ids, keys and values for them, and what it guessed. Not for concurrent use.

    It may run ahead of the text on its own guesses: a guess whose ids then came true is not made again.

    Attributes:
        limit: longest text in tokens.
        recall: what verified text says of the next token; it hears of verified text from who drives the context.
    """

    def __init__(self, draft: OnnxDraft, guesser: Guesser, recall: Recall | None = None) -> None:
        self._draft = draft
        self._guesser = guesser
        self.recall = recall
        self.limit = draft.manifest.architecture.context
        self._runner = make_runner(draft.session, draft.manifest.architecture)
        self._ids: list[int] = []
        # Logits behind the last id; None after a roll-back.
        self._logits: Logits | None = None
        # Guesses for consecutive positions from `_first`; each was made behind `_ids` up to its position.
        self._first = 0
        self._guesses: list[Guess] = []

    @property
    def ids(self) -> list[int]:
        """The ids that the context holds."""
        return list(self._ids)

    def prefill(self, ids: list[int]) -> None:
        """Puts `ids` behind what the context holds.

        Raises:
            ContextOverflow: the text would be longer than the draft's context; it stays as it was.
            DraftError: onnxruntime failed.
        """
        if ids:
            self._read(ids)
            # What was guessed for these positions is settled now.
            self._keep_guesses(len(self._ids))

    def _read(self, ids: list[int]) -> None:
        self._check_room(len(self._ids) + len(ids))
        self._draft.begin_step(id(self))
        try:
            self._logits = self._runner.append(ids)
        except Exception as error:  # onnxruntime's exceptions share no base class
            self._runner.truncate(len(self._ids))
            self._logits = None
            raise DraftError(f"the draft failed at position {len(self._ids)}: {error}") from error
        finally:
            self._draft.end_step(id(self))
        self._ids += ids

    def rollback(self, length: int) -> None:
        """Forgets all ids behind the first `length`; on the fused graph this copies nothing."""
        if not 0 <= length <= len(self._ids):
            raise ValueError(f"cannot roll back to {length}: the text has {len(self._ids)} tokens")
        if length < len(self._ids):
            self._runner.truncate(length)
            del self._ids[length:]
            self._logits = None
            del self._guesses[max(0, length + 1 - self._first) :]

    def follow(self, ids: list[int], stopped: Callable[[], bool] = bool) -> None:
        """Makes the context begin with `ids`, by rolling back to what is common and prefilling the rest.

        Where `ids` ends before the context does, the context has run ahead, and what it holds behind stays. `stopped`
        is asked before every piece; true leaves the rest unread.
        """
        self._check_room(len(ids))
        common = self._common(ids)
        if common < len(ids):
            self.rollback(common)
        while len(self._ids) < len(ids) and not stopped():
            self.prefill(ids[len(self._ids) :][:PREFILL_PIECE])

    def unread(self, ids: list[int]) -> int:
        """How many of `ids` the context would have to read to begin with them."""
        return len(ids) - self._common(ids)

    def ready(self, ids: list[int]) -> int:
        """How many tokens behind `ids` are guessed already."""
        known = len(self._guesses) - (len(ids) - self._first)
        return known if 0 < known <= len(self._guesses) and self._common(ids) == len(ids) else 0

    def propose(
        self,
        ids: list[int],
        count: int,
        sampling: Sampling,
        *,
        siblings: int = 0,
        sibling_confidence: float = 1.0,
        min_confidence: float = 0.0,
        min_survival: float = 0.0,
        calibration: tuple[float, ...] = (),
        survival: float = 1.0,
        stopped: Callable[[], bool] = bool,
    ) -> Proposal:
        """Guesses up to `count` tokens behind `ids`; the context then holds all of them but the last.

        Args:
            ids: at least one; read first, as `follow` does.
            sampling: as the target will be sampled: the draft draws with the same noise.
            siblings: how many alternatives to name beside a token.
            sibling_confidence: name them beside tokens of at most this probability.
            min_confidence: stop behind a token whose probability is below this.
            min_survival, calibration: see `Plan`.
            survival: chance that the text is what `ids` says, where it ends in guesses.
            stopped: asked before every step of the draft; true ends the proposal there.

        Raises:
            ContextOverflow: `ids` is longer than the draft's context.
            DraftError: the text is empty, or onnxruntime failed.
        """
        if not ids:
            raise DraftError("nothing to continue: the text is empty")
        self.follow(ids)
        tokens: list[int] = []
        beside: dict[int, list[int]] = {}
        confidences: list[float] = []
        ready = 0
        self._keep_guesses(len(ids))
        # The guess behind the last token that the context can hold is the last one that can be made.
        for position in range(len(ids), min(len(ids) + count, self.limit + 1)):
            index = position - len(ids)
            if index < len(self._guesses):
                ready += 1
            elif stopped():
                break
            else:
                self._guesses.append(self._guess(position, tokens, sampling, siblings))
            guess = self._guesses[index]
            tokens.append(guess.token)
            confidences.append(guess.confidence)
            if siblings and guess.siblings and guess.confidence <= sibling_confidence:
                beside[index] = guess.siblings[:siblings]
            survival *= calibrated(guess.confidence, calibration)
            if guess.confidence < min_confidence or survival < min_survival:
                break
        return Proposal(tokens, beside, confidences, ready, survival)

    def _guess(self, position: int, tokens: list[int], sampling: Sampling, siblings: int) -> Guess:
        """Makes the guess for `position`; `tokens` are the guesses before it."""
        if len(self._ids) < position:
            self._read(tokens[len(self._ids) - position :])
        elif len(self._ids) > position or self._logits is None:
            last = self._ids[position - 1]
            self.rollback(position - 1)
            self._read([last])
        assert self._logits is not None
        hint = self.recall.hint(self._ids) if self.recall else None
        (token, *others), confidence = self._guesser.guess(self._logits, sampling, position, 1 + siblings, hint)
        return Guess(token, others, confidence)

    def prepare(self, start: int, count: int, sampling: Sampling) -> None:
        """Does what guesses for `count` positions from `start` on will need and does not depend on the text."""
        self._guesser.prepare(sampling, range(start, start + count))

    def _keep_guesses(self, position: int) -> None:
        """Drops the guesses that are not for `position` or behind it."""
        passed = position - self._first
        self._guesses = self._guesses[passed:] if 0 <= passed <= len(self._guesses) else []
        self._first = position

    def _check_room(self, length: int) -> None:
        if length > self.limit:
            raise ContextOverflow(
                f"{length} tokens are more than the draft's context of {self.limit}; "
                "shorten the prompt, or let the cloud go on alone (--num-assistant-tokens 0)"
            )

    def _common(self, ids: list[int]) -> int:
        """How many leading ids the context and `ids` share."""
        common, most = 0, min(len(self._ids), len(ids))
        while common < most:
            middle = (common + most + 1) // 2
            if self._ids[common:middle] == ids[common:middle]:
                common = middle
            else:
                most = middle - 1
        return common
