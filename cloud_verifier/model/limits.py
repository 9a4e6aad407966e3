"""What a round and an opening have to be before they are played, by their target and the verifier's limits."""

from __future__ import annotations

import asyncio

import msgspec

from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, OpenRequest, RoundRequest


class VerifierLimits(msgspec.Struct, frozen=True):
    """What one verifier process grants.

    Attributes:
        max_sessions: concurrent sessions; the least recently used is evicted.
        max_tokens: tokens of all sessions together.
        max_draft: draft tokens per round (K).
        max_own: tokens of the target's own per round (n).
        max_body: bytes of a request body.
        idle_seconds: sessions unused for longer are evicted.
        page: tokens that a session's memory grows by at once.
        max_queue_seconds: that a round may wait for its first token; while one has waited longer, new ones are
            refused, and openings from half of that on.
    """

    max_sessions: int = 256
    max_tokens: int = 262_144
    max_draft: int = messages.MOST_DRAFT
    max_own: int = messages.MOST_OWN
    max_body: int = 1 << 20
    idle_seconds: float = 600.0
    page: int = 1
    max_queue_seconds: float = 3.0


async def check_opening(opening: OpenRequest, target: Target, limits: VerifierLimits) -> None:
    """Raises VerifierRefused unless `target` can begin with `opening`."""
    if opening.vocabulary not in ("", target.vocabulary):
        raise VerifierRefused(
            ErrorCode.VOCABULARY_MISMATCH,
            f"the draft's vocabulary {opening.vocabulary[:80]} is not {target.version}'s {target.vocabulary}; "
            "export a draft from this target",
            409,
        )
    # Hashing tensors takes a while the first time; others go on being served.
    if opening.draft and opening.draft != await asyncio.to_thread(target.identity_like, opening.draft):
        raise VerifierRefused(
            ErrorCode.DRAFT_MISMATCH,
            f"the tensors that the draft shares ({opening.draft[:80]}) are not those of {target.version}; "
            "ask for a version that kept them, or export a draft from this one",
            409,
        )
    limit = target.context - 1
    if len(opening.prompt) > limit:
        raise VerifierRefused(
            ErrorCode.CONTEXT_OVERFLOW,
            f"the prompt has {len(opening.prompt)} tokens and {target.version} takes {limit}; shorten it",
            413,
            {"limit": limit},
        )
    _check_ids(opening.prompt, target)
    if opening.first.round != 0:
        raise VerifierRefused(ErrorCode.ROUND_OUT_OF_ORDER, "the first round is round 0", 409, {"expected": 0})
    if opening.first.position != len(opening.prompt):
        raise VerifierRefused(
            ErrorCode.WRONG_POSITION,
            f"position {opening.first.position} is not where the prompt ends ({len(opening.prompt)})",
            409,
            {"expected": len(opening.prompt)},
        )
    if opening.first.expects not in ([], opening.prompt[-1:]):
        raise VerifierRefused(
            ErrorCode.ROUND_VOID, f"the prompt does not end with token {opening.first.expects[0]}", 409
        )
    check_round(opening.first, target, limits)


def check_round(playing: RoundRequest, target: Target, limits: VerifierLimits) -> None:
    """Raises VerifierRefused unless the round is one that `target` can play, whatever the text."""
    nodes = 1 + len(playing.draft) + sum(map(len, playing.siblings.values()))
    for what, size, limit in (
        ("draft tokens", len(playing.draft), limits.max_draft),
        ("draft tokens and siblings", nodes - 1, messages.MOST_NODES - 1),
        ("tokens of the target's own", playing.n, limits.max_own),
    ):
        if size > limit:
            raise VerifierRefused(
                ErrorCode.DRAFT_TOO_LONG, f"{size} {what} in one round; at most {limit}", 400, {"limit": limit}
            )
    if any(index >= len(playing.draft) for index in playing.siblings):
        raise VerifierRefused(ErrorCode.MALFORMED, "siblings for a draft token that does not exist", 400)
    _check_ids(playing.draft, target)
    for alternatives in playing.siblings.values():
        _check_ids(alternatives, target)


def _check_ids(ids: list[int], target: Target) -> None:
    worst = max(ids, default=0)
    if worst >= target.vocabulary_size:
        raise VerifierRefused(
            ErrorCode.INVALID_TOKEN,
            f"token id {worst} is outside {target.version}'s vocabulary of {target.vocabulary_size}",
            400,
        )
