"""Server-side speculation: the verifier drafts the target's own tokens, and verifies several per forward.

Of the n tokens that the target generates in a round, each after the first forward would cost one forward. A draft model
next to the target drafts K of them with the same noise, and one forward verifies them all. The rule of acceptance is
the one for a board's drafts, so the text is the same.

`onnx_speculation` runs a board's bundle on the CPU; `torch_speculation` runs a draft in PyTorch on the target's device.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple, Protocol

from cloud_verifier.model.batch import SegmentRunner
from cloud_verifier.model.kv_cache import CachedSequence
from cloud_verifier.model.runner import RoundWork
from cloud_verifier.model.sampling import SampledTokens
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.messages import MAX_TREE_NODES
from edge_runtime.protocol.sampling import Sampling

# Default of `Speculation.max_rounds`.
DEFAULT_MAX_ROUNDS = 4


class OwnDraft(NamedTuple):
    """What the verifier drafted for itself after a text.

    Attributes:
        tokens: draft tokens for consecutive positions.
        siblings: alternatives to them, by index into `tokens`.
        confidences: for each how sure the draft is of it, from 0 to 1; none for tokens that no model drafted.
        read: tokens of the text that the draft model read first.
    """

    tokens: list[int]
    siblings: Mapping[int, list[int]] = {}
    confidences: Sequence[float] = ()
    read: int = 0

    @property
    def nodes(self) -> int:
        """Nodes of the tree that verifies it: these, and the text's last token."""
        return 1 + len(self.tokens) + sum(map(len, self.siblings.values()))


class SessionDraft(Protocol):
    """The draft of one session's text. Belongs to the engine's thread."""

    @property
    def cached_sequence(self) -> CachedSequence | None:
        """What it holds of the draft model's KV cache pool; None if it uses none."""

    def can_draft(self, ids: list[int]) -> bool:
        """Whether there can be drafts after `ids`: the context has room, and the draft has not failed."""

    def unread_tokens(self, ids: list[int]) -> int:
        """How many of `ids` the draft model would have to read before it could draft after them, at most."""

    def propose(
        self, ids: list[int], plan: Plan, sampling: Sampling, processor: SequenceProcessor | None = None
    ) -> Generator[RoundWork, SampledTokens | None, OwnDraft]:
        """Draft up to `plan.draft` tokens after `ids`, with the logits processed by `processor` as the target's are.

        A generator: it yields the forwards that it needs and is sent the tokens sampled in them, or yields None to let
        other rounds proceed. It returns fewer tokens if the plan's stop rule or the draft's context ends the draft, and
        no siblings if the draft has none.
        """

    def close(self) -> None:
        """The text has ended: what is cached of it may be used for others of its owner."""


class Speculation(Protocol):
    """A draft model for the target, shared by all sessions.

    Attributes:
        vocabulary: hash of the draft's vocabulary.
        acceptance: its measured acceptance rates, as in a bundle's manifest; may be empty.
        has_siblings: whether its drafts have siblings.
        max_draft_tokens: K, the most tokens to draft for one forward.
        max_rounds: with more concurrent rounds than this nothing is drafted. Each forward is then shared by many rounds
            and would have to wait while drafts are computed for one round after the other.
    """

    vocabulary: str
    acceptance: Mapping[str, float]
    has_siblings: bool
    max_draft_tokens: int
    max_rounds: int

    @property
    def runner(self) -> SegmentRunner | None:
        """The runner of a draft that runs as batched forwards, as the target does; None for any other."""

    def new_session_draft(self, owner: str) -> SessionDraft:
        """A draft for one text. What is cached of other texts is used only if they have the same owner."""


def check_draft_tokens(count: int) -> None:
    """Check the number of draft tokens per forward.

    Raises:
        InputError: one forward cannot verify `count` draft tokens.
    """
    if not 1 <= count < MAX_TREE_NODES:
        raise InputError(f"{count} draft tokens for one forward; give 1 to {MAX_TREE_NODES - 1}")
