"""The speculative decoding loop: `generation.Generation` runs it for one answer."""

from edge_runtime.decoding.detokenizer import CONTEXT_TOKENS, Detokenizer, decode_after
from edge_runtime.decoding.generation import Generation, VerifiedTokens
from edge_runtime.decoding.round_rules import (
    InFlightWork,
    PendingRound,
    limit_ahead,
    limit_continuation,
    limit_draft,
    limit_early_draft,
    work_in_flight,
)
from edge_runtime.decoding.statistics import GenerationStatistics, RoundTotals

__all__ = [
    "CONTEXT_TOKENS",
    "Detokenizer",
    "Generation",
    "GenerationStatistics",
    "InFlightWork",
    "PendingRound",
    "RoundTotals",
    "VerifiedTokens",
    "decode_after",
    "limit_ahead",
    "limit_continuation",
    "limit_draft",
    "limit_early_draft",
    "work_in_flight",
]
