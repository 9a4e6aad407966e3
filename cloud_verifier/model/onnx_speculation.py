"""Server-side speculation with a board's bundle, run by onnxruntime on the CPU.

The board's own runner is reused: a second runner of the same graph would be a second definition of its output.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from pathlib import Path

from cloud_verifier.model.runner import RoundWork
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.speculation import DEFAULT_MAX_ROUNDS, OwnDraft, check_draft_tokens
from cloud_verifier.model.target import Target
from edge_runtime.draft import DEFAULT_PREFIX_CACHE_BYTES, PREFILL_CHUNK_TOKENS, OnnxDraft
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import DraftError, TargetError
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.messages import MAX_TREE_NODES
from edge_runtime.protocol.sampling import Sampling

log = logging.getLogger(__name__)

NOTHING = OwnDraft([])


class OnnxSpeculation:
    """A bundle as the draft of a target; implements `speculation.Speculation`."""

    runner = None
    has_siblings = True

    def __init__(
        self,
        bundle: Path,
        target: Target,
        *,
        max_draft_tokens: int,
        threads: int = 0,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
    ) -> None:
        """Load the bundle.

        Args:
            threads: CPU threads of a draft step; 0 leaves the choice to `OnnxDraft`.
            prefix_cache_bytes: see `OnnxDraft`.

        Raises:
            InputError: one forward cannot verify `max_draft_tokens`.
            TargetError: the draft was made for another vocabulary.
            BundleError, DraftError: the bundle is incomplete or does not load.
        """
        check_draft_tokens(max_draft_tokens)
        found = read_bundle(bundle)
        vocabulary, size = found.manifest.vocabulary.hash, found.manifest.architecture.vocabulary_size
        if vocabulary not in target.draft_vocabularies or size > target.vocabulary_size:
            raise TargetError(
                f"the draft in {bundle} has the vocabulary {vocabulary} of {size} tokens, {target.version} has "
                f"{target.vocabulary} of {target.vocabulary_size}; export a draft from this target or leave out --draft"
            )
        self.vocabulary = vocabulary
        self.acceptance: Mapping[str, float] = found.manifest.acceptance
        self.max_draft_tokens = max_draft_tokens
        self.max_rounds = max_rounds
        self._draft = OnnxDraft(found, threads, prefix_cache_bytes)

    def new_session_draft(self, owner: str) -> OnnxSessionDraft:
        return OnnxSessionDraft(self._draft, owner)


class OnnxSessionDraft:
    """The bundle's draft of one text; implements `speculation.SessionDraft`."""

    cached_sequence = None

    def __init__(self, draft: OnnxDraft, owner: str) -> None:
        self._context = draft.new_context()
        self._owner = owner
        self._begun = self._failed = False

    def can_draft(self, ids: list[int]) -> bool:
        """See `SessionDraft.can_draft`."""
        return not self._failed and len(ids) <= self._context.limit

    def unread_tokens(self, ids: list[int]) -> int:
        """See `SessionDraft.unread_tokens`."""
        return self._context.tokens_to_prefill(ids)

    def propose(
        self, ids: list[int], plan: Plan, sampling: Sampling, processor: SequenceProcessor | None = None
    ) -> Generator[RoundWork, SampledTokens | None, OwnDraft]:
        """See `SessionDraft.propose`. Yields None after every chunk of a long prefill.

        Returns nothing if the draft's context is full or the draft has failed: the target then continues without it.
        """
        if not self.can_draft(ids):
            return NOTHING
        if not self._begun:
            self._begun = True
            self._context.reuse_prefix(ids, self._owner)
        read = self._context.tokens_to_prefill(ids)
        try:
            while (unread := self._context.tokens_to_prefill(ids)) > PREFILL_CHUNK_TOKENS:
                self._context.sync_to(ids[: len(ids) - unread + PREFILL_CHUNK_TOKENS])
                yield None
            proposal = self._context.propose(ids, plan.draft, sampling, plan, processor=processor)
            # The text's last token is a node as well.
            proposal = proposal.limit_nodes(MAX_TREE_NODES - 1)
            return OwnDraft(proposal.tokens, proposal.siblings, proposal.confidences, read)
        except DraftError:
            log.exception("drafting failed; this session continues without server-side speculation")
            self._failed = True
            return NOTHING

    def close(self) -> None:
        if not self._failed:
            self._context.close()
