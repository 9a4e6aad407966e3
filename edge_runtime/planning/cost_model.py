"""What the parts of a round cost, learned from every round: drafting, the link, the verifier, joules.

All times are in seconds. Before anything was observed, figures come from the `Device` or are mild guesses; each part
then follows what rounds report, within a few rounds even after a step change.
"""

from __future__ import annotations

from edge_runtime.planning.acceptance_table import SPECULATED
from edge_runtime.planning.device_model import Device
from edge_runtime.planning.estimators import Curve, Level, Recent, Wandering
from edge_runtime.planning.plan import Conditions, Outcome

# Guesses before the first answer.
LINK_SECONDS = 0.05
FORWARD_SECONDS = 0.03
# Share by which a forward grows with each node; measured: 1.5 % for a session alone, more in full batches.
RISE = 0.01
# A round's bytes, and each id's; a stream carries FRAME_BYTES more every FRAME_SECONDS at most.
ROUND_BYTES = 150.0
ID_BYTES = 1.3
FRAME_BYTES = 15.0
FRAME_SECONDS = 0.05
# A verifier that speculates by itself produces its own tokens up to so many times faster than one per forward.
SPECULATION = 0.35
# Of how much such a forward brings, a stream tells as much as so many tokens at most, for texts differ, and a short one
# much less; so many are remembered, and so many in a row that are odd are a change.
STREAM_TOKENS = 24.0
STREAM_LENGTH = 128.0
STREAMS_MEMORY = 600.0
STREAMS_PATIENCE = 120.0


class Costs:
    """Running estimates.

    Attributes:
        link: a round's time on the link: both ways, everything but the verifier and the board.
        queue: waiting at the verifier.
        forward: the verifier's forward by its number of nodes.
        own: the verifier's time for each forward for further tokens of its own, drafting beside it included.
        speculates: whether these bring more than a token each.
        brings: how many more they bring, of a verifier that speculates, than the draft's acceptance promises: it is
            faster on easy texts, as the board is.
        pace: how many times longer drafting takes than the device's figures say.
        round_bytes: of a round without ids.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.link = Wandering(LINK_SECONDS)
        self.queue = Level(0.001)
        self.forward = Curve(FORWARD_SECONDS, RISE)
        self.own = Level(FORWARD_SECONDS, memory=1500.0, patience=16.0)
        self.speculates = False
        self.brings = Level(1.0, memory=STREAMS_MEMORY, patience=STREAMS_PATIENCE, trust=0.9)
        self.pace = Level(1.0, trust=0.9)
        self.round_bytes = Level(ROUND_BYTES)
        self._links = Recent()

    def observe(self, outcome: Outcome, bringing: float) -> None:
        """Learns from a round.

        Args:
            bringing: tokens that a speculated forward brings.
        """
        self._observe_draft(outcome)
        if outcome.forward_seconds > 0.0:
            self._observe_verifier(outcome, bringing)
        if not (outcome.repeated or outcome.early) and outcome.exchange_seconds > 0.0:
            self._observe_link(outcome)

    def listen(self, conditions: Conditions) -> None:
        """Before a round was observed, the kernel's round-trip time is the best figure of the link."""
        if not self.link.now.known and conditions.surroundings.rtt_seconds is not None:
            self.link.now.value = conditions.surroundings.rtt_seconds

    def step_seconds(self, position: int) -> float:
        """One draft step behind `position` tokens."""
        return self.pace.value * self.device.step_at(position)

    def prefill_seconds(self, unread: int) -> float:
        """What reading `unread` tokens adds to the first draft step."""
        return self.pace.value * self.device.prefill_seconds * max(0, unread - 1)

    def own_seconds(self, bringing: float) -> float:
        """The verifier's time for each further token of its own, as far as it is known.

        Args:
            bringing: tokens that a speculated forward brings, by the draft's acceptance.
        """
        if not self.own.known:
            return self.forward.at(1.0)
        return self.own.value / max(1.0, bringing * self.brings.value) if self.speculates else self.own.value

    def own_hoped(self, bringing: float) -> float:
        """The least that `own_seconds` could yet turn out to be."""
        return self.own_seconds(bringing) if self.own.known else SPECULATION * self.forward.at(1.0)

    def streamed(self, outcome: Outcome, bringing: float) -> float:
        """Tokens of its own that a verifier would have said, on average, in the time that it takes for this round's.

        A verifier that speculates has the same draft, so a round tells how many forwards its tokens would have taken.
        """
        if not outcome.drafted or not self.speculates:
            return outcome.tokens
        most = 1 + SPECULATED
        forwards = outcome.accepted // most + 1.0
        if outcome.accepted == outcome.drafted:
            forwards = (outcome.accepted + 1) / most
        return forwards * max(1.0, bringing * self.brings.value) + outcome.own - 1

    def link_quantile(self, share: float) -> float:
        """The time on the link that `share` of the last rounds did not exceed."""
        return self._links.quantile(share, self.link.now.value)

    def joules_of(self, outcome: Outcome) -> float:
        """Modelled joules of the board in a round, above idle, drafting ahead included."""
        device = self.device
        return (
            (device.busy_watts - device.idle_watts) * (outcome.draft_seconds + outcome.ahead_seconds)
            + device.radio_watts * outcome.exchange_seconds
            + device.joules_per_byte * (outcome.sent + outcome.received)
        )

    def _observe_draft(self, outcome: Outcome) -> None:
        steps, seconds, conditions = outcome.drafted - outcome.ready, outcome.draft_seconds, outcome.conditions
        position = float(conditions.position)
        if outcome.watched:
            steps, seconds = len(outcome.watched), outcome.ahead_seconds
            position += steps / 2
        if steps < 1 or seconds <= 0.0:
            return
        modelled = steps * self.device.step_at(position)
        modelled += self.device.prefill_seconds * max(0, conditions.unread - 1)
        self.pace.observe(seconds / modelled)

    def _observe_verifier(self, outcome: Outcome, bringing: float) -> None:
        self.queue.observe(outcome.queue_seconds)
        nodes = 1 + outcome.drafted + sum(outcome.offered)
        # A text may end before what was asked for. Who does not count forwards has one for each token.
        tokens = outcome.own - 1 if outcome.plan.own > 1 else 0
        further = min(outcome.further or tokens, tokens)
        changes = self.forward.changes
        if not further:
            self.forward.observe(nodes, outcome.forward_seconds)
            if self.forward.changes > changes:
                # The verifier's load has changed, and its own tokens' cost with it.
                self.own.scale(self.forward.factor)
            return
        streamed = outcome.exchange_seconds - outcome.first_seconds
        rest = outcome.forward_seconds - self.forward.at(nodes) if self.forward.known else streamed
        longest = outcome.forward_seconds * further / (1 + further)
        each = min(max(rest, 0.1 * longest), outcome.forward_seconds) / further
        self.own.observe(each, float(further))
        # Who speculates has fewer forwards than tokens, but for streams in which hardly a guess was right.
        self.speculates = tokens > further or (self.speculates and tokens <= SPECULATED)
        if self.speculates:
            # The last forward brings fewer than it could, by half of what it would beyond one.
            promised = tokens / bringing + 0.5 - 0.5 / bringing
            self.brings.observe(promised / further, min(STREAM_TOKENS, tokens * tokens / STREAM_LENGTH))
        if not self.forward.known:
            self.forward.observe(nodes, max(outcome.forward_seconds - rest, 0.1 * longest))

    def _observe_link(self, outcome: Outcome) -> None:
        # The first tokens' time is that of one exchange, whatever came after them, and whatever the draft did ahead.
        verifier = outcome.forward_seconds
        if outcome.plan.own > 1 and outcome.own > 1:
            verifier = self.forward.at(1 + outcome.drafted + sum(outcome.offered))
        verifier += outcome.queue_seconds + outcome.prefill_seconds
        seconds = outcome.first_seconds - verifier - self.device.overhead_seconds
        seconds = max(seconds, 1e-4)
        changes = self.link.now.changes
        self.link.observe(seconds, outcome.conditions.now + outcome.draft_seconds + outcome.first_seconds)
        if self.link.now.changes > changes:
            self._links.forget(2)
        self._links.observe(seconds)
        if outcome.sent + outcome.received > 0:
            ids = outcome.drafted + sum(outcome.offered) + outcome.own
            self.round_bytes.observe(max(0.0, outcome.sent + outcome.received - ID_BYTES * ids))
