"""Simulates the decoding loop on recorded texts: real planners on a simulated clock.

Rounds follow `edge_runtime.decoding.round_rules`, which the real loop shares, and make the same calls to the planner in
the same order; the verifier's replies follow from the recorded acceptance. All times are modeled.
"""

from __future__ import annotations

from itertools import islice

import msgspec

from edge_runtime.decoding import (
    InFlightWork,
    PendingRound,
    limit_ahead,
    limit_continuation,
    limit_draft,
    limit_early_draft,
    work_in_flight,
)
from edge_runtime.planning.plan import (
    UNRANKED,
    Conditions,
    Plan,
    Planner,
    ShadowGuess,
    Surroundings,
    apply_stop_rule,
)
from edge_runtime.protocol import messages
from edge_runtime.simulation.recorded_texts import RecordedText, accepted_runs
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.world import FRAME_BYTES, ID_BYTES, ROUND_BYTES, World

# `draft.onnx_runner.PREFILL_CHUNK_TOKENS`, repeated here because that module loads onnxruntime.
PREFILL_CHUNK_TOKENS = 128


class SimulatedRound(PendingRound):
    """A round on its way to the simulated verifier.

    Attributes:
        survival: probability that all draft tokens are accepted, by the plan's calibration.
        sent_bytes: payload of the request.
        arrival: when it reaches the verifier.
        repeated: whether it had to be repeated for that.
    """

    survival: float
    sent_bytes: int
    arrival: float
    repeated: bool


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
        simulation = _TextSimulation(self.world, self._planner, text, now=self.now, log=self._log)
        result = simulation.run()
        self.now = simulation.now
        return result

    def run_all(self, texts: list[RecordedText]) -> list[SimulationResult]:
        """Generate one text after the other, without pauses."""
        return [self.run(text) for text in texts]


def simulate(texts: list[RecordedText], planner: Planner, world: World, *, log: bool = False) -> SimulationResult:
    """Generate all of `texts`, at least one, and return their total cost."""
    first, *others = Simulator(world, planner, log=log).run_all(texts)
    return sum(others, first)


class _TextSimulation:
    """The simulation of one text. Indices count from the text's first generated token.

    Attributes:
        now: seconds on the simulated clock.
    """

    def __init__(self, world: World, planner: Planner, text: RecordedText, *, now: float, log: bool) -> None:
        self.now = now
        self._world, self._planner, self._log = world, planner, log
        self._text = text
        self._result = SimulationResult(log=[])
        # `_runs[i]` correct guesses in a row begin at index i.
        self._runs = accepted_runs(text.ranks)
        # Tokens of prompt and text in the draft's KV cache, and tokens drafted for the next positions.
        self._prefilled = 0
        self._drafted = 0
        # When shadow drafting of the last round ends.
        self._shadow_until = 0.0
        # When the verifier is done with the last round.
        self._verified_at = 0.0
        self._version = ""

    def run(self) -> SimulationResult:
        started = self.now
        done, length = 0, len(self._text)
        early: SimulatedRound | None = None
        while done < length:
            done, early = self._run_round(done, early)
        result, device = self._result, self._world.device
        result.tokens = length
        result.latency_seconds = self.now - started
        result.joules += device.idle_watts * result.latency_seconds
        result.joules += (device.busy_watts - device.idle_watts) * result.draft_seconds
        result.joules += device.joules_per_byte * (result.sent + result.received)
        return result

    def _run_round(self, done: int, early: SimulatedRound | None) -> tuple[int, SimulatedRound | None]:
        """Simulate the round that follows `done` tokens, which may have been sent early.

        Returns the tokens done after it, and the next round if it was sent early and is valid.
        """
        world, text, result = self._world, self._text, self._result
        left = len(text) - done
        run = self._runs[done]
        if early is None:
            # A step of the draft that is still running ends first.
            began = self.now = max(self.now, self._shadow_until)
            round = self._prepare_round(done, left)
            sent_bytes = round.sent_bytes
        else:
            began = self.now
            round = early
            round.sent, round.arrival = began, max(early.arrival, self._verified_at)
            # They were counted when it was sent.
            sent_bytes = 0
        plan, drafted, offered, sent = round.plan, round.drafted, round.offered, round.sent
        n = limit_continuation(plan, left, drafted)
        accepted = min(drafted, run)
        queue = world.verifier.sample_queue_seconds()
        forward = world.verifier.forward_seconds[1 + drafted + sum(offered)]
        own, sibling = 1, 0
        if accepted < drafted and text.ranks[done + accepted] <= offered[accepted]:
            # The verifying forward covers the accepted sibling, and so gives the token after it, too.
            own, sibling = 2, text.ranks[done + accepted]
        first_done = round.arrival + queue + forward
        further, busy = 0, forward
        if n > 1:
            own = min(own, n)
            further, extra = self._continue(done + accepted + own, n - own)
            own, busy = n, busy + extra
        self._verified_at = round.arrival + queue + busy
        received_bytes = int(ROUND_BYTES + ID_BYTES * own)
        answered, reply_repeated = world.down(self._verified_at, received_bytes)
        if n > 1:
            # One frame per forward, but at most one per interval.
            received_bytes += FRAME_BYTES * min(1 + further, 1 + int(busy / messages.STREAM_FRAME_SECONDS))
        # The first tokens of a stream leave as soon as they are known.
        first = answered - (self._verified_at - first_done)
        following = None
        finished, watched = answered, 0
        draft_seconds = result.draft_seconds
        work = work_in_flight(plan)
        if work is InFlightWork.AHEAD:
            finished, following = self._draft_ahead(done, round, answered)
        elif work is InFlightWork.SHADOW:
            watched = self._shadow(plan, done, own, sent=sent, first=first, answered=answered)
        if following:
            sent_bytes += following.sent_bytes
            if run < drafted + 1:
                # The round did not end as assumed: the next one is void, and the verifier refuses it.
                following = None
                received_bytes += ROUND_BYTES
                result.void_rounds += 1
        outcome = round.to_outcome(
            accepted=accepted,
            own=own,
            sibling=sibling,
            first_seconds=max(0.0, first - sent),
            exchange_seconds=max(0.0, finished - sent),
            # The verifier reports its times in units of 0.1 ms.
            queue_seconds=_to_100us(queue),
            forward_seconds=_to_100us(busy),
            further=further,
            ahead_seconds=result.draft_seconds - draft_seconds,
            watched=self._shadow_guesses(plan, done, watched),
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            repeated=round.repeated or reply_repeated,
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

    def _prepare_round(self, done: int, left: int) -> SimulatedRound:
        """Plan, draft and send the next round."""
        conditions = self._conditions(left, done, self._drafted)
        plan = self._planner.plan(conditions)
        limit = limit_draft(plan, left)
        path = self._path(done, limit)
        count, survival = _count_drafted(path, plan, 0, limit, 1.0)
        drafted_ahead = min(self._drafted, count)
        draft_seconds = self._draft(done, count)
        return self._send(
            plan,
            conditions,
            confidences=path[:count],
            offered=_count_siblings(path, plan, count),
            survival=survival,
            drafted_ahead=drafted_ahead,
            draft_seconds=draft_seconds,
            now=self.now + draft_seconds,
        )

    def _send(
        self,
        plan: Plan,
        conditions: Conditions,
        *,
        confidences: list[float],
        offered: list[int],
        survival: float,
        drafted_ahead: int,
        draft_seconds: float,
        now: float,
        early: bool = False,
    ) -> SimulatedRound:
        size = int(ROUND_BYTES + ID_BYTES * (len(confidences) + sum(offered)))
        arrival, repeated = self._world.up(now + self._world.device.overhead_seconds, size)
        return SimulatedRound(
            plan=plan,
            conditions=conditions,
            confidences=confidences,
            offered=offered,
            survival=survival,
            drafted_ahead=drafted_ahead,
            draft_seconds=draft_seconds,
            sent=now,
            early=early,
            sent_bytes=size,
            arrival=arrival,
            repeated=repeated,
        )

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
            surroundings=Surroundings(rtt_seconds=self._world.rtt_seconds),
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
        device = self._world.device
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
        verifier = self._world.verifier
        if not verifier.draft_tokens:
            return count, count * verifier.continuation_seconds
        forwards, seconds = 0, 0.0
        while count > 0:
            drafted = min(verifier.draft_tokens, count - 1)
            seconds += verifier.forward_seconds[1 + drafted] + drafted * verifier.cost.draft_seconds
            tokens = 1 + min(drafted, self._runs[start])
            forwards, start, count = forwards + 1, start + tokens, count - tokens
        return forwards, seconds

    def _draft_ahead(self, done: int, round: SimulatedRound, answered: float) -> tuple[float, SimulatedRound | None]:
        """Draft while a round is in flight.

        Returns when the board can continue, after the step under way, and the next round if it was sent early.
        """
        device, result, plan, drafted = self._world.device, self._result, round.plan, round.drafted
        position = self._text.prompt + done
        step = device.step_at(position)
        now = round.sent
        left = len(self._text) - done
        limit = drafted + limit_ahead(plan, left - drafted)
        path = self._path(done, limit)
        wanted, _ = _count_drafted(path, plan, drafted, limit, round.survival)
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
        path = path[drafted + 1 :]
        early = self._send(
            next_plan,
            conditions,
            confidences=path[:count],
            offered=_count_siblings(path, plan, count),
            survival=_survival(path, next_plan, count),
            drafted_ahead=count,
            draft_seconds=0.0,
            now=now,
            early=True,
        )
        return answered, early

    def _shadow(self, plan: Plan, done: int, own: int, *, sent: float, first: float, answered: float) -> int:
        """Prefill and predict while a stream arrives; return how many of its tokens are predicted by its end."""
        device, result = self._world.device, self._result
        position = self._text.prompt + done
        now, predicted = sent, 0
        while self._prefilled < position and now < answered and not self._drafted:
            chunk = min(PREFILL_CHUNK_TOKENS, position - self._prefilled)
            seconds = max(device.step_at(position), chunk * device.prefill_seconds)
            now += seconds
            result.draft_seconds += seconds
            self._prefilled += chunk
        interval = (answered - first) / max(1, own - 1)
        while plan.watch and now < answered and predicted < own and not self._drafted:
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

    def _shadow_guesses(self, plan: Plan, done: int, count: int) -> list[ShadowGuess]:
        """The draft's predictions of `count` tokens after `done`."""
        ranks = (rank if rank <= plan.siblings else UNRANKED for rank in self._text.ranks[done : done + count])
        return list(zip(self._text.confidences[done : done + count], ranks, strict=True))

    def _roll_draft(self, done: int, run: int, tokens: int) -> None:
        """Roll the draft forward by `tokens` verified tokens, or back to its first wrong guess."""
        position = self._text.prompt + done
        if self._drafted:
            self._prefilled = position + min(run, tokens, self._drafted - 1)
        self._drafted = max(0, self._drafted - tokens) if run >= tokens else 0


def _to_100us(seconds: float) -> float:
    return round(seconds, 4)


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
        survival, stop = apply_stop_rule(
            survival,
            confidence,
            min_confidence=plan.min_confidence,
            min_survival=plan.min_survival,
            calibration=plan.calibration,
        )
        if stop:
            break
    return count, survival


def _survival(path: list[float], plan: Plan, count: int) -> float:
    """Probability that all of `count` tokens that are drafted already are accepted."""
    return _count_drafted(path, msgspec.structs.replace(plan, min_confidence=0.0), 0, count, 1.0)[1]


def _count_siblings(path: list[float], plan: Plan, count: int) -> list[int]:
    """Number of siblings sent with each of the first `count` guesses, within what one verification takes.

    The real loop drops the whole sibling set that does not fit (`Proposal.limit_nodes`); this model shortens it.
    """
    if not plan.siblings:
        return [0] * count
    room = messages.MAX_TREE_NODES - 1 - count
    wanted = [plan.siblings if confidence <= plan.sibling_confidence else 0 for confidence in islice(path, count)]
    return wanted if sum(wanted) <= room else [max(0, min(n, room - sum(wanted[:i]))) for i, n in enumerate(wanted)]
