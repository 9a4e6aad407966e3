"""Server-side speculation with a draft in PyTorch on the target's device, batched over sessions.

The draft is a model like any target, with a runner and a KV cache pool of its own. Each of its forwards extends the
drafts of all sessions that are drafting at that moment by one token. Its tokens may differ from those of a board's
quantized graph; the text does not. It has no siblings: of a row only the best token leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CachedSequence
from cloud_verifier.model.runner import RoundWork
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.speculation import DEFAULT_MAX_ROUNDS, OwnDraft, check_draft_tokens
from cloud_verifier.model.target import Target, make_runner
from edge_runtime.planning.plan import Plan, apply_stop_rule
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.sampling import Sampling, common_prefix_length


class TorchSpeculation:
    """A transformers model as the draft of a target; implements `speculation.Speculation`.

    Attributes:
        context: longest text that can be drafted for, in tokens.
    """

    has_siblings = False

    def __init__(
        self, model: Any, target: Target, *, max_draft_tokens: int, max_rounds: int = DEFAULT_MAX_ROUNDS
    ) -> None:
        """Move the draft to the target's device and dtype.

        Args:
            model: a transformers causal language model, on the CPU.

        Raises:
            InputError: one forward cannot verify `max_draft_tokens`.
            TargetError: the draft has another vocabulary.
        """
        check_draft_tokens(max_draft_tokens)
        size = model.config.vocab_size
        if size != target.vocabulary_size:
            raise TargetError(f"the draft has {size} tokens, {target.version} has {target.vocabulary_size}")
        self.vocabulary = target.vocabulary
        self.acceptance: Mapping[str, float] = {}
        self.max_draft_tokens = max_draft_tokens
        self.max_rounds = max_rounds
        self.context: int = min(target.context, model.config.max_position_embeddings)
        model = model.to(device=target.device, dtype=target.dtype).eval()
        self.runner = make_runner(model, self.context)

    def new_session_draft(self, owner: str) -> TorchSessionDraft:
        return TorchSessionDraft(self)


class TorchSessionDraft:
    """The PyTorch draft of one text; implements `speculation.SessionDraft`."""

    def __init__(self, speculation: TorchSpeculation) -> None:
        self._speculation = speculation
        self._sequence = CachedSequence()
        # The tokens in the draft's cache: the text, and drafts after it that may have been rejected.
        self._ids: list[int] = []

    @property
    def cached_sequence(self) -> CachedSequence:
        return self._sequence

    def close(self) -> None:
        """Keep nothing: the scheduler releases `cached_sequence`."""

    def can_draft(self, ids: list[int]) -> bool:
        """See `SessionDraft.can_draft`."""
        return len(ids) < self._speculation.context

    def unread_tokens(self, ids: list[int]) -> int:
        """See `SessionDraft.unread_tokens`."""
        return len(ids) - common_prefix_length(self._ids[: self._sequence.length], ids)

    def propose(
        self, ids: list[int], plan: Plan, sampling: Sampling, processor: SequenceProcessor | None = None
    ) -> Generator[RoundWork, SampledTokens | None, OwnDraft]:
        """See `SessionDraft.propose`.

        What a token's probability is on a board, 1 - exp(-margin) is here: it grows with how likely the token is
        accepted, and the sampler on the device gives it at no cost.
        """
        count = min(plan.draft, self._speculation.context - len(ids))
        if not self.can_draft(ids):
            return OwnDraft([])
        # Roll back to the longest cached prefix of `ids`, and leave at least one token to score.
        cached = min(len(ids) - self.unread_tokens(ids), len(ids) - 1)
        self._sequence.length = cached
        self._ids = ids[:cached]
        unread = ids[cached:]
        read = len(unread)
        chunk = self._speculation.runner.max_prefill_rows
        while len(unread) > chunk:
            yield from self._extend(unread[:chunk], None)
            unread = unread[chunk:]
        draft: list[int] = []
        confidences: list[float] = []
        survival, stop = 1.0, False
        while len(draft) < count and not stop:
            if processor:
                processor.sync_to(ids + draft)
            sampled = yield from self._extend(unread, sampling, processor)
            assert sampled is not None
            token, margin, _ = sampled[len(unread) - 1]
            draft.append(token)
            confidences.append(-math.expm1(-margin))
            survival, stop = apply_stop_rule(plan, survival, confidences[-1])
            unread = draft[-1:]
        return OwnDraft(draft, {}, confidences, read)

    def _extend(
        self, ids: list[int], sampling: Sampling | None, processor: SequenceProcessor | None = None
    ) -> Generator[RoundWork, SampledTokens | None, SampledTokens | None]:
        runner = self._speculation.runner
        sampled = yield Segment.from_tokens(self._sequence, ids, sampling=sampling, processor=processor, runner=runner)
        self._ids += ids
        return sampled
