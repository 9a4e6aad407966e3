"""Simulates the decoding loop on recorded texts: real planners on a simulated clock.

Rounds follow `edge_runtime.planning.round_rules`, which the real loop shares, and make the same calls to the planner in
the same order; the verifier's replies follow from the recorded acceptance. All times are modeled.
"""

from __future__ import annotations

from itertools import islice

import msgspec

from edge_runtime.planning.plan import UNRANKED, Conditions, Outcome, Plan, Planner, Surroundings, apply_stop_rule
from edge_runtime.planning.round_rules import (
    PREFILL_CHUNK_TOKENS,
    limit_ahead,
    limit_continuation,
    limit_draft,
    limit_early_draft,
)
from edge_runtime.protocol import messages
from edge_runtime.simulation.recorded_texts import RecordedText, accepted_runs
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.world import FRAME_BYTES, ID_BYTES, ROUND_BYTES, World


class SimulatedRound(msgspec.Struct):
    """A round on its way to the simulated verifier.

    Attributes:
        outcome: what is known of the outcome before the reply.
        survival: probability that all draft tokens are accepted, by the plan's calibration.
        sent: when the request is sent; for an early round when the previous one is answered.
        arrival: when it reaches the verifier.
    """

    outcome: Outcome
    survival: float
    sent: float
    arrival: float


class Simulator:
    """A board that generates one text after the other with one planner.

    Attributes:
        now: seconds on the simulated clock.
        world: the board's surroundings.
    """

    def __init__(self, world: World, planner: Planner, *, log: bool = False) -> None:
        self.world = world
        self.now = 0.0
        self._planner = planner
        self._log = log

    def run(self, text: RecordedText) -> SimulationResult:
        """Generate one text."""
        self._text = text
        # `_runs[i]` correct guesses in a row begin at index i; indices count from the text's first generated token.
        self._runs = accepted_runs(text.ranks)
        # Tokens of prompt and text in the draft's KV cache, and tokens drafted for the next positions.
        self._prefilled = self._drafted = 0
        # When shadow drafting of the last round ends, and when the verifier is done with the last round.
        self._shadow_until = self._verified_at = 0.0
        self._version = ""
        result = self._result = SimulationResult(tokens=len(text))
        device, started = self.world.device, self.now
        done = 0
        early: SimulatedRound | None = None
        while done < len(text):
            done, early = self._run_round(done, early)
        result.latency_seconds = self.now - started
        result.joules += device.idle_watts * result.latency_seconds
        result.joules += (device.busy_watts - device.idle_watts) * result.draft_seconds
        result.joules += device.joules_per_byte * (result.sent + result.received)
        return result

    def run_all(self, texts: list[RecordedText]) -> list[SimulationResult]:
        """Generate one text after the other, without pauses."""
        return [self.run(text) for text in texts]

    def _run_round(self, done: int, early: SimulatedRound | None) -> tuple[int, SimulatedRound | None]:
        """Simulate the round that follows `done` tokens, which may have been sent early.

        Returns the tokens done after it, and the next round if it was sent early and is valid.
        """
        world, text, result = self.world, self._text, self._result
        left = len(text) - done
        run = self._runs[done]
        if early is None:
            # A step of the draft that is still running ends first.
            wait_seconds = max(0.0, self._shadow_until - self.now)
            began = self.now = self.now + wait_seconds
            pending = self._prepare_round(done, left, wait_seconds)
        else:
            began = self.now
            pending = early
            pending.sent, pending.arrival = began, max(early.arrival, self._verified_at)
        plan, drafted, offered = pending.outcome.plan, pending.outcome.drafted, pending.outcome.offered
        # The bytes of an early round were counted when it was sent.
        sent, sent_bytes = pending.sent, 0 if early else pending.outcome.sent
        n = limit_continuation(plan, left, drafted)
        accepted = min(drafted, run)
        queue = world.verifier.sample_queue_seconds()
        forward = world.verifier.forward_seconds[1 + drafted + sum(offered)]
        own, sibling = 1, 0
        if accepted < drafted and text.ranks[done + accepted] <= offered[accepted]:
            # The verifying forward covers the accepted sibling, and so gives the token after it, too.
            own, sibling = 2, text.ranks[done + accepted]
        first_done = pending.arrival + queue + forward
        further, busy = 0, forward
        if n > 1:
            own = min(own, n)
            further, extra = self._continue(done + accepted + own, n - own)
            own, busy = n, busy + extra
        self._verified_at = pending.arrival + queue + busy
        received_bytes = int(ROUND_BYTES + ID_BYTES * own)
        answered, repeated = world.down(self._verified_at, received_bytes)
        if n > 1:
            # One frame per forward, but at most one per interval.
            received_bytes += FRAME_BYTES * min(1 + further, 1 + int(busy / messages.STREAM_FRAME_SECONDS))
        # The first tokens of a stream leave as soon as they are known.
        first = answered - (self._verified_at - first_done)
        following = None
        finished, watched = answered, 0
        draft_seconds = result.draft_seconds
        if plan.drafts_ahead:
            finished, following = self._draft_ahead(done, pending, answered)
        elif plan.shadows_stream:
            watched = self._shadow(plan, done, own, sent=sent, first=first, answered=answered)
        if following:
            sent_bytes += following.outcome.sent
            if run < drafted + 1:
                # The round did not end as assumed: the next one is void, and the verifier refuses it.
                following = None
                received_bytes += ROUND_BYTES
                result.void_rounds += 1
        ranks = (rank if rank <= plan.siblings else UNRANKED for rank in text.ranks[done : done + watched])
        outcome = msgspec.structs.replace(
            pending.outcome,
            accepted=accepted,
            own_tokens=own,
            sibling=sibling,
            first_seconds=max(0.0, first - sent),
            exchange_seconds=max(0.0, finished - sent),
            # The verifier reports its times in units of 0.1 ms.
            queue_seconds=round(queue, 4),
            forward_seconds=round(busy, 4),
            further_forwards=further,
            ahead_seconds=result.draft_seconds - draft_seconds,
            shadow_guesses=list(zip(text.confidences[done : done + watched], ranks, strict=True)),
            sent=sent_bytes,
            received=received_bytes,
            repeated=pending.outcome.repeated or repeated,
        )
        if not result.rounds:
            result.first_token_seconds = first - began
        result.add_round(outcome)
        result.verifier_seconds += busy
        result.joules += world.device.radio_watts * (answered - sent)
        if self._log:
            result.log.append(outcome)
        self._roll_draft(done, run, outcome.tokens)
        self.now = finished
        self._version = text.target
        self._planner.observe(outcome)
        return done + outcome.tokens, following

    def _prepare_round(self, done: int, left: int, wait_seconds: float) -> SimulatedRound:
        """Plan, draft and send the next round, after having waited for the draft model."""
        conditions = self._conditions(left, done, self._drafted)
        plan = self._planner.plan(conditions)
        limit = limit_draft(plan, left)
        path = self._path(done, limit)
        count, survival = _count_drafted(path, plan, 0, limit, 1.0)
        ready = min(self._drafted, count)
        seconds = self._draft(done, count)
        path = path[:count]
        offered = _count_siblings(path, plan)
        outcome = Outcome(
            plan,
            conditions,
            confidences=path,
            offered=offered,
            ready=ready,
            draft_seconds=seconds,
            wait_seconds=wait_seconds,
        )
        return self._send(outcome, survival, self.now + seconds)

    def _send(self, outcome: Outcome, survival: float, now: float) -> SimulatedRound:
        """Send the request of a drafted round at `now`."""
        size = int(ROUND_BYTES + ID_BYTES * (outcome.nodes - 1))
        arrival, repeated = self.world.up(now + self.world.device.overhead_seconds, size)
        outcome = msgspec.structs.replace(outcome, sent=size, repeated=repeated)
        return SimulatedRound(outcome, survival, now, arrival)

    def _conditions(self, left: int, done: int, drafted_ahead: int) -> Conditions:
        position = self._text.prompt + done
        return Conditions(
            left=left,
            position=position,
            unread=0 if drafted_ahead else max(0, position - self._prefilled),
            ready=drafted_ahead,
            now=self.now,
            version=self._version,
            temperature=self._text.temperature,
            surroundings=Surroundings(rtt_seconds=self.world.rtt_seconds),
        )

    def _path(self, done: int, count: int) -> list[float]:
        """Confidences of the first `count` guesses after `done` tokens.

        The draft follows the recorded text up to its first wrong guess, then the continuation recorded for that miss.
        """
        text, run = self._text, self._runs[done]
        if count <= run + 1:
            return text.confidences[done : done + count]
        continuation = text.continuations[done + run]
        path = text.confidences[done : done + run + 1] + continuation[: count - run - 1]
        return path + continuation[-1:] * (count - len(path))

    def _draft(self, done: int, count: int) -> float:
        """Draft until there are `count` tokens; return the seconds that it takes."""
        device = self.world.device
        position = self._text.prompt + done
        seconds = 0.0
        if count > self._drafted:
            step = device.step_at(position)
            if not self._drafted:
                seconds = max(0.0, device.prefill_seconds * (position - self._prefilled) - step)
                self._prefilled = position
            seconds += step * (count - self._drafted)
            self._drafted = count
        self._result.draft_seconds += seconds
        return seconds

    def _continue(self, start: int, count: int) -> tuple[int, float]:
        """Return the target's forwards, and their seconds, for `count` own tokens from index `start` on."""
        verifier = self.world.verifier
        if not verifier.draft_tokens:
            return count, count * verifier.continuation_seconds
        forwards, seconds = 0, 0.0
        while count > 0:
            drafted = min(verifier.draft_tokens, count - 1)
            seconds += verifier.forward_seconds[1 + drafted] + drafted * verifier.cost.draft_seconds
            tokens = 1 + min(drafted, self._runs[start])
            forwards, start, count = forwards + 1, start + tokens, count - tokens
        return forwards, seconds

    def _draft_ahead(self, done: int, pending: SimulatedRound, answered: float) -> tuple[float, SimulatedRound | None]:
        """Draft while a round is in flight.

        Returns when the board can continue, after the step under way, and the next round if it was sent early.
        """
        device, result, plan = self.world.device, self._result, pending.outcome.plan
        drafted = pending.outcome.drafted
        position = self._text.prompt + done
        step = device.step_at(position)
        now = pending.sent
        left = len(self._text) - done
        limit = drafted + limit_ahead(plan, left - drafted)
        path = self._path(done, limit)
        wanted, _ = _count_drafted(path, plan, drafted, limit, pending.survival)
        if not self._drafted:
            self._prefilled = position
        while self._drafted < wanted and now < answered:
            now += step
            result.draft_seconds += step
            self._drafted += 1
        # The first round opens the session; until it is answered, no other can be sent.
        if self._drafted < wanted or now >= answered or plan.in_flight < 2 or not self._version:
            return max(answered, now), None
        # Drafted after the guess of the bonus token.
        drafted_ahead = wanted - drafted - 1
        if drafted_ahead < 1:
            return answered, None
        self.now, resumed = now, self.now
        conditions = self._conditions(left - drafted - 1, done + drafted + 1, drafted_ahead)
        self.now = resumed
        next_plan = self._planner.plan(conditions)
        count = limit_early_draft(next_plan, left - drafted - 1, drafted_ahead)
        if not count:
            return answered, None
        path = path[drafted + 1 :][:count]
        # The siblings were drafted by the plan of the round in flight.
        offered = _count_siblings(path, plan)
        outcome = Outcome(next_plan, conditions, confidences=path, offered=offered, ready=count, early=True)
        return answered, self._send(outcome, _survival(path, next_plan), now)

    def _shadow(self, plan: Plan, done: int, own: int, *, sent: float, first: float, answered: float) -> int:
        """Prefill and predict while a stream arrives; return how many of its tokens are predicted by its end."""
        device, result = self.world.device, self._result
        position = self._text.prompt + done
        now, predicted = sent, 0
        while self._prefilled < position and now < answered and not self._drafted:
            chunk = min(PREFILL_CHUNK_TOKENS, position - self._prefilled)
            seconds = max(device.step_at(position), chunk * device.prefill_seconds)
            now += seconds
            result.draft_seconds += seconds
            self._prefilled += chunk
        interval = (answered - first) / max(1, own - 1)
        while plan.shadow and now < answered and predicted < own and not self._drafted:
            # A token is predicted only after it has arrived, and the end of the stream waits for no prediction.
            now = max(now, first + predicted * interval)
            seconds = device.step_at(position + predicted)
            if now + seconds > answered:
                break
            now += seconds
            result.draft_seconds += seconds
            self._prefilled = max(self._prefilled, position + predicted)
            predicted += 1
        self._shadow_until = now
        return predicted

    def _roll_draft(self, done: int, run: int, tokens: int) -> None:
        """Roll the draft forward by `tokens` verified tokens, or back to its first wrong guess."""
        position = self._text.prompt + done
        if self._drafted:
            self._prefilled = position + min(run, tokens, self._drafted - 1)
        self._drafted = max(0, self._drafted - tokens) if run >= tokens else 0


def simulate(texts: list[RecordedText], planner: Planner, world: World, *, log: bool = False) -> SimulationResult:
    """Generate all of `texts`, at least one, and return their total cost."""
    first, *others = Simulator(world, planner, log=log).run_all(texts)
    return sum(others, first)


def _count_drafted(path: list[float], plan: Plan, start: int, limit: int, survival: float) -> tuple[int, float]:
    """Apply the stop rule to the guesses from index `start` on.

    Returns how many of at most `limit` guesses are drafted, and the survival of all of them; `survival` unchanged if
    the plan has no stop rule, which is then not needed.
    """
    if not plan.min_survival and not plan.min_confidence:
        return limit, survival
    count = start
    for confidence in islice(path, start, limit):
        count += 1
        survival, stop = apply_stop_rule(plan, survival, confidence)
        if stop:
            break
    return count, survival


def _survival(path: list[float], plan: Plan) -> float:
    """Probability that all tokens of `path`, which are drafted already, are accepted."""
    return _count_drafted(path, msgspec.structs.replace(plan, min_confidence=0.0), 0, len(path), 1.0)[1]


def _count_siblings(path: list[float], plan: Plan) -> list[int]:
    """Number of siblings sent with each draft token, within what one verification takes.

    The real loop drops the whole sibling set that does not fit (`Proposal.limit_nodes`); this model shortens it.
    """
    if not plan.siblings:
        return [0] * len(path)
    room = messages.MAX_TREE_NODES - 1 - len(path)
    wanted = [plan.siblings if confidence <= plan.sibling_confidence else 0 for confidence in path]
    return wanted if sum(wanted) <= room else [max(0, min(n, room - sum(wanted[:i]))) for i, n in enumerate(wanted)]
