"""What the verifier drafts for itself before a forward: as much as makes a text fastest, perhaps nothing.

What drafting costs and saves differs by a factor of ten between machines and texts: a draft on the CPU beside a small
target on a GPU costs more than it saves. So times and acceptance are measured, and the board's own search
(`edge_runtime.planning.search`) finds length, stop threshold and siblings for them: to it, a verifier is a board
without a link. The text is the same whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cloud_verifier.model.speculation import OwnDraft
from edge_runtime.planning.acceptance_model import AcceptanceModels
from edge_runtime.planning.acceptance_table import MAX_SIBLINGS, AcceptanceTable
from edge_runtime.planning.estimators import MonotoneCurve, RobustMean
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.search import DraftedRound, RoundPrices, RoundSearch
from edge_runtime.protocol.sampling import Sampling

# Before anything is measured: seconds of a verification, its increase per node as a share, seconds of drafting a token,
# and of reading one. Chosen: so optimistic that drafts are tried.
VERIFY_SECONDS, VERIFY_SLOPE, DRAFT_SECONDS, READ_SECONDS = 0.03, 0.01, 0.001, 0.0001
# Estimates of seconds are at least this, so that they have ratios.
MIN_SECONDS = 1e-6
# With more unread tokens than this the time of a draft tells how long reading takes, not drafting. Chosen: more than a
# verification adds to a text.
MANY_UNREAD = 16
# Verifications after which a width that none of them had is taken to cost what its neighbors suggest, so that it is
# tried again: how much more wide forwards cost changes with the load. Chosen.
FORGOTTEN_AFTER = 64
# Share of the time without drafts that trying one again may cost. Load and texts change. Chosen.
EXPLORATION_SHARE = 0.02
# Prices that have changed by less do not start a new search.
PRICE_TOLERANCE = 0.04
NO_DRAFT = Plan(0)


class OwnDraftPlanner:
    """Plans the verifier's own drafts on one kind of target, and learns from each step of a text.

    A step goes from one forward's tokens to the next one's: perhaps a draft, and a verification. Belongs to the
    engine's thread.
    """

    def __init__(
        self,
        acceptance: Mapping[str, float] | None = None,
        observe: Callable[[int, int], object] = lambda drafted, accepted: None,
    ) -> None:
        """
        Args:
            acceptance: see `Speculation.acceptance`.
            observe: called with the length and the accepted tokens of each draft, also of those left out.
        """
        self._observe = observe
        self._acceptance = AcceptanceModels(acceptance or {})
        # Seconds of a verification by nodes, from the end of drafting to the sampled tokens; of drafting a token; of
        # reading one before.
        self._verify_seconds = MonotoneCurve(VERIFY_SECONDS, VERIFY_SLOPE, forget_after=FORGOTTEN_AFTER)
        self._draft_seconds, self._read_seconds = RobustMean(DRAFT_SECONDS), RobustMean(READ_SECONDS)
        # Since the latest draft.
        self._seconds_without = 0.0
        self._rounds = RoundSearch(PRICE_TOLERANCE)

    def plan(
        self,
        version: str,
        sampling: Sampling,
        streak: int,
        *,
        longest: int,
        siblings: bool,
        unread: int,
        left: int,
    ) -> Plan:
        """Plan the next draft of a text; `Plan.draft` is 0 where a draft would cost more than it saves.

        Args:
            version: of the target.
            streak: consecutive correct guesses so far.
            longest: most tokens to draft, at least 1.
            siblings: whether the draft has siblings and the target verifies them.
            unread: tokens that the draft model would have to read first.
            left: tokens that may still be generated.
        """
        acceptance = self._acceptance.get(version, sampling.temperature)
        best = self._search(acceptance.table_after(streak), longest, siblings)
        # In seconds: of reading first, of a token without drafts, and what a draft may cost more than it saves.
        reading = unread * self._read_seconds.value
        undrafted = self._verify_seconds.at(1)
        loss = reading + max(0.0, best.cost - undrafted) * best.tokens
        if reading + best.cost * left < undrafted * left or loss <= EXPLORATION_SHARE * self._seconds_without:
            if unread <= MANY_UNREAD:
                # A draft after much reading tells nothing of how long drafting takes: the next one is a trial as well.
                self._seconds_without = 0.0
            return best.plan
        # Texts change: what is known of earlier ones must not keep drafts from later ones forever.
        acceptance.fade()
        self._observe(0, 0)
        return NO_DRAFT

    def learn_draft(
        self,
        version: str,
        sampling: Sampling,
        streak: int,
        draft: OwnDraft,
        *,
        seconds: float,
        accepted: int,
        tokens: Sequence[int],
    ) -> int:
        """Learn from a verified draft of a model; return the text's streak after it.

        Args:
            seconds: that it took, reading included.
            accepted, tokens: accepted tokens, and the target's own after them.
        """
        drafted = len(draft.tokens)
        if draft.read > MANY_UNREAD:
            self._read_seconds.observe(max(0.0, seconds - drafted * self._draft_seconds.value) / draft.read)
        elif drafted:
            self._draft_seconds.observe(seconds / drafted)
        self._observe(drafted, accepted)
        siblings = draft.siblings.get(accepted, [])
        return self._acceptance.get(version, sampling.temperature).learn_draft(
            streak,
            draft.confidences,
            accepted=accepted,
            offered=[len(draft.siblings.get(index, ())) for index in range(drafted)],
            sibling=siblings.index(tokens[0]) + 1 if tokens and tokens[0] in siblings else 0,
        )

    def learn_verification(self, draft: OwnDraft, seconds: float, *, left_out: bool = False) -> None:
        """Learn how long the verification of a draft took, the wait for other texts' forwards included.

        Args:
            left_out: the plan was to draft nothing.
        """
        self._verify_seconds.observe(draft.nodes, seconds)
        if left_out:
            self._seconds_without += seconds

    def _search(self, table: AcceptanceTable, longest: int, siblings: bool) -> DraftedRound:
        nodes, seconds = self._verify_seconds.knots
        draft_seconds = max(MIN_SECONDS, self._draft_seconds.value)
        # Of what the search can price, a verifier has no link, and pays by time alone.
        prices = RoundPrices(
            exchange=0.0,
            step=draft_seconds,
            id=0.0,
            flight_second=1.0,
            forward_second=1.0,
            step_ahead=0.0,
            void=0.0,
            step_seconds=draft_seconds,
            flight_seconds=0.0,
            overhead_seconds=0.0,
            queue_seconds=0.0,
            forward_nodes=nodes,
            forward_seconds=seconds,
            max_length=longest,
            max_siblings=MAX_SIBLINGS if siblings else 0,
        )
        self._rounds.update(prices)
        return self._rounds.best(table, prices)
