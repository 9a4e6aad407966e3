"""What a planner has learned about a draft, in a form that outlives the process: its evidence and its regret budget.

Link and verifier are not part of it, because the first round measures both.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_runtime.planning.acceptance_table import CONFIDENCE_BINS, MAX_SIBLINGS, STAGE_STREAKS

# Number of target versions and temperature classes that are kept, the latest ones. Chosen: some 100 KB.
MAX_RECORDS = 64
# Relative slack of sums of decayed counts, for rounding.
COUNT_SLACK = 1e-6

Count = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
BinCounts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=CONFIDENCE_BINS, max_length=CONFIDENCE_BINS)]
StageCounts = Annotated[
    tuple[BinCounts, ...], msgspec.Meta(min_length=len(STAGE_STREAKS), max_length=len(STAGE_STREAKS))
]
SiblingCounts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=MAX_SIBLINGS, max_length=MAX_SIBLINGS)]


class AcceptanceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Decayed counts of judged tokens of one target version and temperature class.

    Attributes:
        version: exact target version.
        temperature_class: see `acceptance_model.temperature_class`.
        judged: all judged tokens.
        last_stage: those of drafts that began in the last stage.
        seen, hits: tokens, and accepted ones, by stage and confidence bin.
        offered, sibling_hits: siblings of rejected tokens, and correct ones, by rank.
    """

    version: str
    temperature_class: Annotated[int, msgspec.Meta(ge=0, le=2)]
    judged: Count
    last_stage: Count
    seen: StageCounts
    hits: StageCounts
    offered: SiblingCounts
    sibling_hits: SiblingCounts

    def __post_init__(self) -> None:
        pairs = [*zip(self.offered, self.sibling_hits, strict=True), (self.judged, self.last_stage)]
        for seen, hits in zip(self.seen, self.hits, strict=True):
            pairs += zip(seen, hits, strict=True)
        if any(part > whole * (1.0 + COUNT_SLACK) + COUNT_SLACK for whole, part in pairs):
            raise ValueError("a count exceeds that of which it is a part")


class PlannerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a planner has learned.

    Attributes:
        regret_tokens: the regret budget, in streamed tokens.
        acceptance: one record for each target version and temperature class, the latest last.
    """

    regret_tokens: float
    acceptance: Annotated[list[AcceptanceRecord], msgspec.Meta(max_length=MAX_RECORDS)]
