"""The frozen draft on the board: reads a bundle, guesses the next tokens, forgets what was wrong."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import onnxruntime as ort
import psutil
from tokenizers import Tokenizer

from edge_runtime.contract.bundle import Bundle, Manifest, read_bundle
from edge_runtime.contract.coupling import Chooser, Sampling, confidence
from edge_runtime.contract.errors import BundleCorrupt, ContextOverflow, DraftError
from edge_runtime.graphs import Logits, graph_kind, make_runner


class Proposal(msgspec.Struct, frozen=True):
    """Draft tokens for consecutive positions.

    Attributes:
        tokens: at most K ids; fewer where the draft stopped early or its context ended.
        siblings: for each index, the next best ids by coupled score, best first.
        confidences: the draft's probability of each token.
    """

    tokens: list[int]
    siblings: dict[int, list[int]]
    confidences: list[float]


NOTHING = Proposal([], {}, [])


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
            BundleCorrupt: the graph is not of the kind that the manifest says.
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
        self._chooser = Chooser(bundle.manifest.architecture.vocabulary_size)

    @classmethod
    def load(cls, path: Path, *, threads: int = 0, verify: bool = True) -> OnnxDraft:
        """Reads, checks and loads the bundle at `path`. Raises BundleError and DraftError."""
        return cls(read_bundle(path, verify=verify), threads)

    def context(self) -> DraftContext:
        """A context for one text, empty at first."""
        return DraftContext(self, self._chooser)


class DraftContext:
    """The draft's view of one text: its ids, and keys and values for all of them. Not for concurrent use.

    Attributes:
        limit: longest text in tokens.
    """

    def __init__(self, draft: OnnxDraft, chooser: Chooser) -> None:
        self._draft = draft
        self._chooser = chooser
        self.limit = draft.manifest.architecture.context
        self._runner = make_runner(draft.session, draft.manifest.architecture)
        self._ids: list[int] = []
        # Logits behind the last id; None after a roll-back.
        self._logits: Logits | None = None

    @property
    def ids(self) -> list[int]:
        """The ids that the context holds."""
        return list(self._ids)

    def prefill(self, ids: list[int]) -> None:
        """Puts `ids` behind the text.

        Raises:
            ContextOverflow: the text would be longer than the draft's context; it stays as it was.
            DraftError: onnxruntime failed.
        """
        if not ids:
            return
        if len(self._ids) + len(ids) > self.limit:
            raise ContextOverflow(
                f"{len(self._ids) + len(ids)} tokens are more than the draft's context of {self.limit}; "
                "shorten the prompt, or let the cloud go on alone (--num-assistant-tokens 0)"
            )
        started = time.perf_counter()
        try:
            self._logits = self._runner.append(ids)
        except Exception as error:  # onnxruntime's exceptions share no base class
            self._runner.truncate(len(self._ids))
            self._logits = None
            raise DraftError(f"the draft failed at position {len(self._ids)}: {error}") from error
        finally:
            self._draft.run_seconds += time.perf_counter() - started
        self._ids += ids

    def rollback(self, length: int) -> None:
        """Forgets all ids behind the first `length`; on the fused graph this copies nothing."""
        if not 0 <= length <= len(self._ids):
            raise ValueError(f"cannot roll back to {length}: the text has {len(self._ids)} tokens")
        if length < len(self._ids):
            self._runner.truncate(length)
            del self._ids[length:]
            self._logits = None

    def follow(self, ids: list[int]) -> None:
        """Makes the context hold exactly `ids`, by rolling back to what is common and prefilling the rest."""
        common, most = 0, min(len(self._ids), len(ids))
        while common < most:
            middle = (common + most + 1) // 2
            if self._ids[common:middle] == ids[common:middle]:
                common = middle
            else:
                most = middle - 1
        self.rollback(common)
        self.prefill(ids[common:])

    def propose(
        self,
        count: int,
        sampling: Sampling,
        *,
        siblings: int = 0,
        sibling_confidence: float = 1.0,
        min_confidence: float = 0.0,
    ) -> Proposal:
        """Guesses up to `count` tokens behind the text; the context then holds all of them but the last.

        Args:
            sampling: as the target will be sampled: the draft draws with the same noise.
            siblings: how many alternatives to name beside a token.
            sibling_confidence: name them beside tokens of at most this probability.
            min_confidence: stop behind a token whose probability is below this.

        Raises:
            DraftError: the text is empty, or onnxruntime failed.
        """
        if not self._ids:
            raise DraftError("nothing to continue: prefill the prompt first")
        tokens: list[int] = []
        beside: dict[int, list[int]] = {}
        confidences: list[float] = []
        # The guess behind the last token that the context can hold is the last one that can be made.
        for index in range(min(count, self.limit - len(self._ids) + 1)):
            if index:
                self.prefill([tokens[-1]])
            elif self._logits is None:
                last = self._ids[-1]
                self.rollback(len(self._ids) - 1)
                self.prefill([last])
            assert self._logits is not None
            token, *others = self._chooser.rank(self._logits, sampling, len(self._ids), 1 + siblings).ids
            tokens.append(token)
            confidences.append(confidence(self._logits, token, sampling.temperature))
            if others and confidences[-1] <= sibling_confidence:
                beside[index] = others
            if confidences[-1] < min_confidence:
                break
        return Proposal(tokens, beside, confidences)
