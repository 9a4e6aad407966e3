"""Cost model of a round: online estimates of drafting, link, verifier and energy costs.

All times are in seconds. Before the first observation, figures come from the `DeviceModel` or from defaults; each
estimate then follows the outcomes of rounds, within a few rounds even after a step change.
"""

from __future__ import annotations

from edge_runtime.planning.acceptance_table import VERIFIER_DRAFT_LENGTH
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.estimators import MonotoneCurve, RecentValues, RobustMean, TwoRegimeMean
from edge_runtime.planning.plan import Conditions, Outcome

# Defaults before the first reply (chosen).
LINK_SECONDS = 0.05
QUEUE_SECONDS = 0.001
FORWARD_SECONDS = 0.03
# Increase of the verifier's forward per tree node, as a share; measured: 1.5 % for one session, more in full batches.
FORWARD_SLOPE = 0.01
# Payload bytes of a round without ids, of each token id, and of each frame of a stream after the first.
ROUND_BYTES = 150.0
ID_BYTES = 1.3
FRAME_BYTES = 15.0
# Optimistic bound of the time per own token of a verifier of which it is unknown whether it speculates, in forwards.
SPECULATION_BOUND = 0.35
# Weight of one stream in `CostModel.yield_ratio`: min(MAX_STREAM_WEIGHT, tokens^2 / STREAM_WEIGHT_SCALE). It is capped
# because texts differ, and a short stream is much weaker evidence than a long one. Memory and patience are those of
# `RobustMean`, in the same unit.
MAX_STREAM_WEIGHT = 24.0
STREAM_WEIGHT_SCALE = 128.0
YIELD_MEMORY = 600.0
YIELD_PATIENCE = 120.0


class CostModel:
    """Running cost estimates.

    Several methods take `tokens_per_forward`: the expected yield of a speculative verifier forward according to the
    acceptance model.

    Attributes:
        link: time of a round on the link, both ways: all but the verifier's and the board's time.
        queue: waiting time at the verifier.
        forward: verifier forward by number of tree nodes.
        own_forward: verifier time per forward for further own tokens, its own drafting included.
        verifier_speculates: whether such a forward yields more than one token, because the verifier drafts as well.
        yield_ratio: measured to predicted yield of a speculative verifier's forward. The prediction follows the draft's
            acceptance: a speculative verifier is faster on easy text, as the board is.
        slowdown: measured to modeled drafting time.
        round_bytes: payload of a round without token ids.
    """

    def __init__(self, device: DeviceModel) -> None:
        self.device = device
        self.link = TwoRegimeMean(LINK_SECONDS)
        self.queue = RobustMean(QUEUE_SECONDS)
        self.forward = MonotoneCurve(FORWARD_SECONDS, FORWARD_SLOPE)
        self.own_forward = RobustMean(FORWARD_SECONDS, memory=1500.0, patience=16.0)
        self.verifier_speculates = False
        self.yield_ratio = RobustMean(1.0, memory=YIELD_MEMORY, patience=YIELD_PATIENCE, guess_weight=0.9)
        self.slowdown = RobustMean(1.0, guess_weight=0.9)
        self.round_bytes = RobustMean(ROUND_BYTES)
        self._recent_link = RecentValues()

    def observe(self, outcome: Outcome, tokens_per_forward: float) -> None:
        """Learn from a round."""
        self._observe_draft(outcome)
        if outcome.forward_seconds > 0.0:
            self._observe_verifier(outcome, tokens_per_forward)
        if not (outcome.repeated or outcome.early) and outcome.exchange_seconds > 0.0:
            self._observe_link(outcome)

    def use_kernel_rtt(self, conditions: Conditions) -> None:
        """Take the kernel's round-trip time as the link estimate as long as no round has measured the link."""
        if not self.link.now.known and conditions.surroundings.rtt_seconds is not None:
            self.link.now.value = conditions.surroundings.rtt_seconds

    def step_seconds(self, position: int) -> float:
        """Return the time of one draft step after `position` tokens."""
        return self.slowdown.value * self.device.step_at(position)

    def prefill_seconds(self, unread: int) -> float:
        """Return the time by which prefilling `unread` tokens prolongs the first draft step."""
        return self.slowdown.value * self.device.prefill_seconds * max(0, unread - 1)

    def own_token_seconds(self, tokens_per_forward: float) -> float:
        """Return the verifier's time per further own token, or that of a forward if none was measured."""
        if not self.own_forward.known:
            return self.forward.at(1.0)
        if not self.verifier_speculates:
            return self.own_forward.value
        return self.own_forward.value / max(1.0, tokens_per_forward * self.yield_ratio.value)

    def optimistic_own_token_seconds(self, tokens_per_forward: float) -> float:
        """Return a lower bound of what `own_token_seconds` may turn out to be."""
        if self.own_forward.known:
            return self.own_token_seconds(tokens_per_forward)
        return SPECULATION_BOUND * self.forward.at(1.0)

    def streaming_equivalent(self, outcome: Outcome, tokens_per_forward: float) -> float:
        """Return how many own tokens a verifier would stream, on average, in the time that this round's tokens take it.

        That is the number of tokens, unless the verifier speculates. It then uses the same draft model, so the outcome
        of a drafted round shows how many speculative forwards its tokens would have taken.
        """
        if not outcome.drafted or not self.verifier_speculates:
            return outcome.tokens
        max_yield = 1 + VERIFIER_DRAFT_LENGTH
        forwards = outcome.accepted // max_yield + 1.0
        if outcome.accepted == outcome.drafted:
            forwards = (outcome.accepted + 1) / max_yield
        return forwards * max(1.0, tokens_per_forward * self.yield_ratio.value) + outcome.own_tokens - 1

    def least_equivalent(self, drafted: int, tokens_per_forward: float) -> float:
        """Return the minimum of `streaming_equivalent` over all outcomes of a round of `drafted` tokens."""
        if not self.verifier_speculates:
            return 1.0
        share = min(1.0, (drafted + 1) / (1 + VERIFIER_DRAFT_LENGTH))
        return share * max(1.0, tokens_per_forward * self.yield_ratio.value)

    def link_quantile(self, share: float) -> float:
        """Return the link time that `share` of the last rounds did not exceed."""
        return self._recent_link.quantile(share, self.link.now.value)

    def round_joules(self, outcome: Outcome) -> float:
        """Return the modeled energy of the board in a round, above idle, including drafting ahead."""
        device = self.device
        return (
            (device.busy_watts - device.idle_watts) * (outcome.draft_seconds + outcome.ahead_seconds)
            + device.radio_watts * outcome.exchange_seconds
            + device.joules_per_byte * (outcome.sent + outcome.received)
        )

    def _observe_draft(self, outcome: Outcome) -> None:
        steps, seconds, conditions = outcome.drafted - outcome.ready, outcome.draft_seconds, outcome.conditions
        position = float(conditions.position)
        if outcome.shadow_guesses:
            steps, seconds = len(outcome.shadow_guesses), outcome.ahead_seconds
            position += steps / 2
        if steps < 1 or seconds <= 0.0:
            return
        modeled = steps * self.device.step_at(position)
        modeled += self.device.prefill_seconds * max(0, conditions.unread - 1)
        self.slowdown.observe(seconds / modeled)

    def _observe_verifier(self, outcome: Outcome, tokens_per_forward: float) -> None:
        # The round that opens a session waits for the prefill as well, which other rounds do not.
        if not outcome.prefill_seconds:
            self.queue.observe(outcome.queue_seconds)
        nodes = outcome.nodes
        # A text may end before the planned number of tokens. A verifier that does not report its forwards is taken to
        # use one per token.
        tokens = outcome.own_tokens - 1 if outcome.plan.continuation > 1 else 0
        further = min(outcome.further_forwards or tokens, tokens)
        changes = self.forward.changes
        if not further:
            self.forward.observe(nodes, outcome.forward_seconds)
            if self.forward.changes > changes:
                # The verifier's load has changed, which changes the cost of its own tokens as well.
                self.own_forward.scale(self.forward.change_factor)
            return
        # Split the reported forward time between the first forward and the further ones.
        streaming = outcome.exchange_seconds - outcome.first_seconds
        rest = outcome.forward_seconds - self.forward.at(nodes) if self.forward.known else streaming
        even_split = outcome.forward_seconds * further / (1 + further)
        per_forward = min(max(rest, 0.1 * even_split), outcome.forward_seconds) / further
        self.own_forward.observe(per_forward, float(further))
        # A speculative verifier uses fewer forwards than tokens, except in short streams without an accepted token.
        self.verifier_speculates = tokens > further or (self.verifier_speculates and tokens <= VERIFIER_DRAFT_LENGTH)
        if self.verifier_speculates:
            # The end of the text truncates the last forward's yield, on average by half of what exceeds one token.
            predicted = tokens / tokens_per_forward + 0.5 - 0.5 / tokens_per_forward
            self.yield_ratio.observe(predicted / further, min(MAX_STREAM_WEIGHT, tokens * tokens / STREAM_WEIGHT_SCALE))
        if not self.forward.known:
            self.forward.observe(nodes, max(outcome.forward_seconds - rest, 0.5 * even_split / further))

    def _observe_link(self, outcome: Outcome) -> None:
        # The time to the first tokens is one exchange, whatever was streamed or drafted ahead after it.
        verifier = outcome.forward_seconds
        if outcome.plan.continuation > 1 and outcome.own_tokens > 1:
            verifier = self.forward.at(outcome.nodes)
        verifier += outcome.queue_seconds + outcome.prefill_seconds
        seconds = outcome.first_seconds - verifier - self.device.overhead_seconds
        seconds = max(seconds, 1e-4)
        changes = self.link.now.changes
        self.link.observe(seconds, outcome.conditions.now + outcome.draft_seconds + outcome.first_seconds)
        if self.link.now.changes > changes:
            self._recent_link.keep_last(2)
        self._recent_link.observe(seconds)
        if outcome.sent + outcome.received > 0:
            ids = outcome.nodes - 1 + outcome.own_tokens
            self.round_bytes.observe(max(0.0, outcome.sent + outcome.received - ID_BYTES * ids))
