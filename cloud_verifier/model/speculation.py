"""Speculation beside the target: the verifier drafts the target's own tokens itself, several to a forward.

Of a round's n tokens, those behind the first forward cost a forward each; a draft beside the target guesses the next K
with the same noise, and one forward verifies them all. The rule is the board's, so the text is the same.

Here the draft is a board's bundle, run by the board's own runner on the CPU: `edge_runtime.draft` is the one thing
beyond `edge_runtime.protocol` that the verifier imports of the board's, because a second runner of the same graph would
be a second definition of what it says. For a draft that runs where the target does see `drafting`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import Path

from cloud_verifier.model.kv_cache import Text
from cloud_verifier.model.runner import Chosen, Runner, Wanted
from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.onnx_runner import PREFILL_PIECE
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import DraftError, InputError, TargetError
from edge_runtime.protocol.messages import MOST_NODES
from edge_runtime.protocol.sampling import Sampling

MOST_ROUNDS = 4

log = logging.getLogger(__name__)


class Speculation:
    """A draft beside the target, shared by all sessions.

    Attributes:
        vocabulary: hash of the draft's.
        tokens: K, the most tokens to draft for one forward.
        most_rounds: with more rounds than these at once nothing is drafted here: a forward is shared by many then, and
            drafting for one after the other would keep it waiting.
        runner: of the draft, where it is a model like the target; None where it is a graph of a board's.
    """

    runner: Runner | None = None

    def __init__(
        self, bundle: Path, target: Target, tokens: int, threads: int = 0, most_rounds: int = MOST_ROUNDS
    ) -> None:
        """Loads the bundle.

        Args:
            threads: CPU threads of a draft step; 0 leaves it to `OnnxDraft`.

        Raises:
            InputError: `tokens` is not what one forward can verify.
            TargetError: the draft was made for another vocabulary.
            BundleError, DraftError: the bundle is not whole or does not load.
        """
        check_tokens(tokens)
        found = read_bundle(bundle)
        vocabulary, size = found.manifest.vocabulary.hash, found.manifest.architecture.vocabulary_size
        if vocabulary != target.vocabulary or size > target.vocabulary_size:
            raise TargetError(
                f"the draft in {bundle} has the vocabulary {vocabulary} of {size} tokens, {target.version} has "
                f"{target.vocabulary} of {target.vocabulary_size}; export a draft from this target or leave out --draft"
            )
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.most_rounds = most_rounds
        self._draft = OnnxDraft(found, threads)

    def guesses(self) -> Guesses:
        """For one text, of which the draft has read nothing yet."""
        return Guesses(self._draft)


def check_tokens(tokens: int) -> None:
    """Raises InputError unless one forward can verify so many."""
    if not 1 <= tokens < MOST_NODES:
        raise InputError(f"{tokens} draft tokens for one forward; give 1 to {MOST_NODES - 1}")


class Guesses:
    """The draft's view of one session's text. Belongs to the engine's thread."""

    def __init__(self, draft: OnnxDraft) -> None:
        self._context = draft.context()
        self._failed = False

    @property
    def text(self) -> Text | None:
        """What it holds of a pool, if it does."""
        return None

    def behind(self, ids: list[int], count: int, sampling: Sampling) -> Generator[Wanted, Chosen | None, list[int]]:
        """Drafts up to `count` tokens behind `ids`, and returns them; yields after every piece of a long text it reads.

        Returns nothing where the draft's context is full or the draft has failed: the target goes on alone.
        """
        if self._failed or len(ids) > self._context.limit:
            return []
        try:
            while (unread := self._context.unread(ids)) > PREFILL_PIECE:
                self._context.follow(ids[: len(ids) - unread + PREFILL_PIECE])
                yield None
            return self._context.propose(ids, count, sampling).tokens
        except DraftError:
            log.exception("the target goes on alone in this session")
            self._failed = True
            return []
