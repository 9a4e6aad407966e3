"""The limits of a verifier, and the checks of openings and rounds before they reach the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import GrammarError, VerifierRefused
from edge_runtime.protocol.grammar import GrammarMatcher
from edge_runtime.protocol.logits_processing import TokenConstraint
from edge_runtime.protocol.messages import ErrorCode, OpenRequest, RoundRequest

# CPU time that the mask of a grammar may take on average, because a forward waits for it. Chosen: a usual one takes
# 0.1 ms.
SECONDS_PER_MASK = 0.005


class VerifierLimits(msgspec.Struct, frozen=True):
    """The limits of one verifier process.

    Attributes:
        max_sessions: concurrent sessions; with more, those of whoever holds most are evicted (see `SessionStore`).
        max_tokens: tokens of all sessions together; 0 for what memory has room for once the target is loaded.
        max_draft: draft tokens per round (K).
        max_own: tokens that the target generates per round (n).
        max_body: bytes of a request body.
        idle_seconds: sessions unused for longer are evicted.
        page: tokens by which a session's memory grows (see `kv_cache.allocation_granularity`).
        max_queue_seconds: how long a round may wait for its first token. While one has waited longer, new rounds are
            refused; openings are refused from half of that on. They wait for room in the session store for the same
            times.
    """

    max_sessions: int = 256
    max_tokens: int = 262_144
    max_draft: int = messages.MAX_DRAFT_TOKENS
    max_own: int = messages.MAX_CONTINUATION_TOKENS
    max_body: int = 1 << 20
    idle_seconds: float = 600.0
    page: int = 1
    max_queue_seconds: float = 3.0


async def check_opening(opening: OpenRequest, target: Target, limits: VerifierLimits) -> None:
    """Check that `target` can serve the session and its first round.

    Raises:
        VerifierRefused: vocabulary, draft, prompt or first round do not fit.
    """
    if opening.vocabulary and opening.vocabulary not in target.draft_vocabularies:
        raise VerifierRefused(
            ErrorCode.VOCABULARY_MISMATCH,
            f"the draft's vocabulary {opening.vocabulary[:80]} is not {target.version}'s {target.vocabulary}; "
            "export a draft from this target",
        )
    # Hashing tensors takes a while the first time; the event loop keeps serving others.
    if opening.draft and opening.draft != await asyncio.to_thread(target.expected_identity, opening.draft):
        raise VerifierRefused(
            ErrorCode.DRAFT_MISMATCH,
            f"the tensors that the draft shares ({opening.draft[:80]}) are not those of {target.version}; "
            "ask for a version that kept them, or export a draft from this one",
        )
    limit = target.context - 1
    if len(opening.prompt) > limit:
        raise VerifierRefused(
            ErrorCode.CONTEXT_OVERFLOW,
            f"the prompt has {len(opening.prompt)} tokens and {target.version} takes {limit}; shorten it",
            detail={"limit": limit},
        )
    if opening.generated >= len(opening.prompt):
        raise VerifierRefused(
            ErrorCode.WRONG_POSITION,
            f"of {len(opening.prompt)} ids, {opening.generated} cannot have been generated after a prompt",
            detail={"expected": len(opening.prompt)},
        )
    _check_ids("prompt", opening.prompt, target)
    _check_ids("logit_bias", opening.sampling.logit_bias, target)
    _check_ids("stop_ids", opening.sampling.stop_ids, target)
    if opening.first.round != 0:
        raise VerifierRefused(ErrorCode.ROUND_OUT_OF_ORDER, "the first round is round 0", detail={"expected": 0})
    if opening.first.position != len(opening.prompt):
        raise VerifierRefused(
            ErrorCode.WRONG_POSITION,
            f"position {opening.first.position} is not the end of the prompt ({len(opening.prompt)})",
            detail={"expected": len(opening.prompt)},
        )
    if opening.first.expects not in ([], opening.prompt[-1:]):
        raise VerifierRefused(ErrorCode.ROUND_VOID, f"the prompt does not end with token {opening.first.expects[0]}")
    check_round(opening.first, target, limits)


async def make_constraint(opening: OpenRequest, target: Target) -> TokenConstraint | None:
    """Return the matcher of the session's grammar; None if it has none.

    Raises:
        VerifierRefused: the grammar is invalid or too costly, or the text so far does not match it.
    """
    if not opening.sampling.grammar:
        return None
    try:
        matcher = GrammarMatcher(await target.grammars.compile_in_thread(opening.sampling.grammar), SECONDS_PER_MASK)
        generated = opening.prompt[len(opening.prompt) - opening.generated :]
        matches = await asyncio.to_thread(matcher.allowed, generated) is not None
    except GrammarError as error:
        raise VerifierRefused(ErrorCode.INVALID_GRAMMAR, str(error)) from None
    if not matches:
        raise VerifierRefused(ErrorCode.INVALID_GRAMMAR, "the text so far does not match the grammar")
    return matcher


def check_round(request: RoundRequest, target: Target, limits: VerifierLimits) -> None:
    """Check the parts of a round that do not depend on the session's text.

    Raises:
        VerifierRefused: the round exceeds a limit or has invalid token ids.
    """
    nodes = 1 + len(request.draft) + sum(map(len, request.siblings.values()))
    for what, size, limit in (
        ("draft tokens", len(request.draft), limits.max_draft),
        ("draft tokens and siblings", nodes - 1, messages.MAX_TREE_NODES - 1),
        ("tokens of the target's own", request.n, limits.max_own),
    ):
        if size > limit:
            raise VerifierRefused(
                ErrorCode.DRAFT_TOO_LONG, f"{size} {what} in one round; at most {limit}", detail={"limit": limit}
            )
    if any(index >= len(request.draft) for index in request.siblings):
        raise VerifierRefused(ErrorCode.MALFORMED, "siblings for a draft token that does not exist")
    _check_ids("draft", request.draft, target)
    for alternatives in request.siblings.values():
        _check_ids("siblings", alternatives, target)


def _check_ids(field: str, ids: Iterable[int], target: Target) -> None:
    largest = max(ids, default=0)
    if largest >= target.vocabulary_size:
        raise VerifierRefused(
            ErrorCode.INVALID_TOKEN,
            f"{field}: token id {largest} is outside {target.version}'s vocabulary of {target.vocabulary_size}",
            detail={"field": field},
        )
