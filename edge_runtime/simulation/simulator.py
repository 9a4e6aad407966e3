"""Plays recorded texts round by round: the planners that boards run, on a simulated clock.

The rounds are those of `edge_runtime.decoding`, its order of calls included, and the verifier's answers those that the
recorded acceptance implies. All times are modelled.
"""

from __future__ import annotations

from itertools import islice

import msgspec

from edge_runtime.planning.plan import UNNAMED, Conditions, Outcome, Plan, Planner, Surroundings, Watched, calibrated
from edge_runtime.simulation.recorded_texts import Text, runs
from edge_runtime.simulation.result import Result
from edge_runtime.simulation.verifiers import LONGEST_DRAFT, WIDEST
from edge_runtime.simulation.world import FRAME_BYTES, FRAME_SECONDS, ID_BYTES, ROUND_BYTES, World

# Tokens that the draft reads at once (`edge_runtime.draft.onnx_runner.PREFILL_PIECE`).
PIECE = 128


class Early(msgspec.Struct, frozen=True):
    """A round on its way before the last one is answered: its tokens, its bytes, when it reaches the verifier, and
    whether it had to be repeated for that."""

    plan: Plan
    conditions: Conditions
    drafted: int
    offered: list[int]
    size: int
    arrival: float
    repeated: bool


class Simulator:
    """A board that answers one text after the other with one planner.

    Attributes:
        now: seconds on the simulated clock.
        world: the board's surroundings.
    """

    def __init__(self, world: World, planner: Planner, *, log: bool = False) -> None:
        self.world = world
        self.now = 0.0
        self._planner = planner
        self._log = log

    def play(self, text: Text) -> Result:
        """Plays one text to its end."""
        return _Play(self.world, self._planner, text, self.now, self._log).run(self)

    def play_all(self, texts: list[Text]) -> list[Result]:
        """One after the other, without a pause."""
        return [self.play(text) for text in texts]


def simulate(texts: list[Text], planner: Planner, world: World, *, log: bool = False) -> Result:
    """All of `texts`, at least one, as one result."""
    first, *others = Simulator(world, planner, log=log).play_all(texts)
    return sum(others, first)


class _Play:
    """One text being played. Indices count from the text's first token; `_run[i]` right guesses begin at i."""

    def __init__(self, world: World, planner: Planner, text: Text, now: float, log: bool) -> None:
        self._world, self._planner, self._log = world, planner, log
        self._text = text
        self._now = now
        self._result = Result(log=[])
        self._run = runs(text.ranks)
        # Tokens of prompt and text that the draft holds; guesses for the next positions that it has made.
        self._read = 0
        self._made = 0
        # When what it does meanwhile is done.
        self._working = 0.0
        self._version = ""

    def run(self, simulator: Simulator) -> Result:
        """Plays, and moves the simulator's clock."""
        started = self._now
        done, length = 0, len(self._text)
        early: Early | None = None
        ended = 0.0
        while done < length:
            done, early, ended = self._round(done, early, ended)
        result = self._result
        result.tokens = length
        result.latency_seconds = self._now - started
        device = self._world.device
        result.joules += device.idle_watts * result.latency_seconds
        result.joules += (device.busy_watts - device.idle_watts) * result.draft_seconds
        result.joules += device.joules_per_byte * (result.sent + result.received)
        simulator.now = self._now
        return result

    def _round(self, done: int, early: Early | None, ended: float) -> tuple[int, Early | None, float]:
        """Plays the round that begins behind `done` tokens; `ended` is when the verifier was done with the last one.

        Returns the tokens then done, the next round if it is on its way and stands, and when the verifier was done.
        """
        world, text, result = self._world, self._text, self._result
        verifier = world.verifier
        left = len(text) - done
        run = self._run[done]
        # What the draft is still at, it ends first.
        began = self._now = max(self._now, self._working) if early is None else self._now
        if early is None:
            conditions = self._conditions(left, done, self._made)
            plan = self._planner.plan(conditions)
            cap = min(plan.draft, left - 1, LONGEST_DRAFT)
            path = self._path(done, run, cap)
            drafted, survival = _stopped(path, plan, 0, cap, 1.0)
            ready = min(self._made, drafted)
            seconds = self._extend(done, drafted)
            offered = _offered(path, plan, drafted)
            sent = began + seconds
            out = int(ROUND_BYTES + ID_BYTES * (drafted + sum(offered)))
            arrival, repeated = world.up(sent + world.device.overhead_seconds, out)
        else:
            plan, conditions, drafted, offered = early.plan, early.conditions, early.drafted, early.offered
            path = self._path(done, run, drafted)
            survival = _survival(path, plan, drafted)
            ready, seconds, sent, out = drafted, 0.0, began, 0
            arrival, repeated = max(early.arrival, ended), early.repeated
            result.early += 1
        n = max(1, min(plan.own, left - drafted))
        accepted = min(drafted, run)
        queue = verifier.wait()
        forward = verifier.forward[1 + drafted + sum(offered)]
        own, sibling = 1, 0
        if accepted < drafted and text.ranks[done + accepted] <= offered[accepted]:
            own, sibling = 2, text.ranks[done + accepted]
            result.sibling_hits += 1
        first_done = arrival + queue + forward
        forwards, busy = 1, forward
        if n > 1:
            own = min(own, n)
            more, extra = self._own(done + accepted + own, n - own)
            own, forwards, busy = n, forwards + more, busy + extra
        ended = arrival + queue + busy
        received = int(ROUND_BYTES + ID_BYTES * own)
        answered, again = world.down(ended, received)
        if n > 1:
            received += FRAME_BYTES * min(forwards, 1 + int(busy / FRAME_SECONDS))
        # A stream's first tokens leave as soon as they are known.
        first = answered - (ended - first_done)
        following = None
        finished, watched = answered, 0
        worked = result.draft_seconds
        if plan.ahead or plan.watch:
            if plan.draft:
                finished, following = self._go_ahead(done, drafted, plan, survival, sent, answered)
            else:
                watched = self._watch(plan, done, own, sent, first, answered)
        if following:
            out += following.size
            if run < drafted + 1:
                following = None
                received += ROUND_BYTES
                result.void += 1
        outcome = Outcome(
            plan,
            conditions,
            accepted,
            own,
            path[:drafted],
            offered,
            sibling,
            ready,
            seconds,
            max(0.0, first - sent),
            max(0.0, finished - sent),
            round(queue, 4),
            round(busy, 4),
            out,
            received,
            repeated or again,
            early is not None,
            ahead_seconds=result.draft_seconds - worked,
            further=forwards - 1,
            watched=self._guessed(plan, done, watched),
        )
        if not result.rounds:
            result.first_token_seconds = first - began
        result.rounds += 1
        result.drafted += drafted
        result.accepted += accepted
        result.sent += out
        result.received += received
        result.verifier_seconds += busy
        result.forwards += forwards
        result.joules += world.device.radio_watts * (answered - sent)
        if self._log:
            result.log.append(outcome)
        self._settle(done, run, accepted + own)
        self._now = finished
        self._version = text.target
        self._planner.observe(outcome)
        return done + accepted + own, following, ended

    def _conditions(self, left: int, done: int, ready: int) -> Conditions:
        position = self._text.prompt + done
        return Conditions(
            left,
            position,
            0 if ready else max(0, position - self._read),
            ready,
            self._now,
            self._version,
            self._text.temperature,
            Surroundings(rtt_seconds=self._world.rtt_seconds),
        )

    def _path(self, done: int, run: int, count: int) -> list[float]:
        """Confidences of the first `count` guesses behind `done` tokens, `run` of which are right."""
        text = self._text
        if count <= run + 1:
            return text.confidences[done : done + count]
        behind = text.behind[done + run]
        further = count - run - 1
        path = text.confidences[done : done + run + 1] + behind[:further]
        return path + behind[-1:] * (count - len(path))

    def _extend(self, done: int, count: int) -> float:
        """Makes guesses until there are `count`; the seconds that it takes."""
        device = self._world.device
        position = self._text.prompt + done
        seconds = 0.0
        if count > self._made:
            step = device.step_at(position)
            if not self._made:
                seconds = max(0.0, device.prefill_seconds * (position - self._read) - step)
                self._read = position
            seconds += step * (count - self._made)
            self._made = count
        self._result.draft_seconds += seconds
        return seconds

    def _own(self, start: int, count: int) -> tuple[int, float]:
        """Forwards, and their seconds, for `count` tokens of the target's own from `start` on."""
        verifier = self._world.verifier
        if not verifier.speculated:
            return count, count * verifier.own_forward
        forwards, seconds = 0, 0.0
        while count > 0:
            guessed = min(verifier.speculated, count - 1)
            seconds += verifier.forward[1 + guessed] + guessed * verifier.cost.draft_seconds
            said = 1 + min(guessed, self._run[start])
            forwards, start, count = forwards + 1, start + said, count - said
        return forwards, seconds

    def _go_ahead(
        self, done: int, drafted: int, plan: Plan, survival: float, sent: float, answered: float
    ) -> tuple[float, Early | None]:
        """What the board does while a round is in flight.

        Returns when the round is over, a step under way included, and the next round if it could be sent.
        """
        device, result = self._world.device, self._result
        position = self._text.prompt + done
        step = device.step_at(position)
        now = sent
        if plan.own > 1:
            return answered, None
        left = len(self._text) - done
        most = drafted + min(1 + plan.ahead, left - drafted)
        path = self._path(done, self._run[done], most)
        wanted, _ = _stopped(path, plan, drafted, most, survival)
        if not self._made:
            self._read = position
        while self._made < wanted and now < answered:
            now += step
            result.draft_seconds += step
            self._made += 1
        # The verifier cannot tie a round to a session that it has yet to open.
        if self._made < wanted or now >= answered or plan.in_flight < 2 or not self._version:
            return max(answered, now), None
        behind = wanted - drafted - 1
        if behind < 1:
            return answered, None
        over, self._now = self._now, now
        conditions = self._conditions(left - drafted - 1, done + drafted + 1, behind)
        self._now = over
        following = self._planner.plan(conditions)
        count = min(following.draft, left - drafted - 2, behind, LONGEST_DRAFT)
        if count < 1 or following.own > 1:
            return answered, None
        offered = _offered(path[drafted + 1 :], plan, count)
        size = int(ROUND_BYTES + ID_BYTES * (count + sum(offered)))
        arrival, repeated = self._world.up(now + device.overhead_seconds, size)
        return answered, Early(following, conditions, count, offered, size, arrival, repeated)

    def _watch(self, plan: Plan, done: int, own: int, sent: float, first: float, answered: float) -> int:
        """What the board does while a stream comes in. Returns how many of its tokens it has guessed by its end."""
        device, result = self._world.device, self._result
        position = self._text.prompt + done
        now, watched = sent, 0
        while self._read < position and now < answered and not self._made:
            piece = min(PIECE, position - self._read)
            seconds = max(device.step_at(position), piece * device.prefill_seconds)
            now += seconds
            result.draft_seconds += seconds
            self._read += piece
        pace = (answered - first) / max(1, own - 1)
        while plan.watch and now < answered and watched < own and not self._made:
            # A token is guessed once it is there, so that a text that is streamed to its end waits for no guess.
            now = max(now, first + watched * pace)
            seconds = device.step_at(position + watched)
            if now + seconds > answered:
                break
            now += seconds
            result.draft_seconds += seconds
            self._read = max(self._read, position + watched)
            watched += 1
        self._working = now
        return watched

    def _guessed(self, plan: Plan, done: int, count: int) -> list[Watched]:
        """What the draft made of `count` tokens behind `done`."""
        ranks = (rank if rank <= plan.siblings else UNNAMED for rank in self._text.ranks[done : done + count])
        return list(zip(self._text.confidences[done : done + count], ranks, strict=True))

    def _settle(self, done: int, run: int, grown: int) -> None:
        """What the draft still knows behind `grown` more tokens."""
        position = self._text.prompt + done
        if self._made:
            self._read = position + min(run, grown, self._made - 1)
        self._made = max(0, self._made - grown) if run >= grown else 0


def _stopped(path: list[float], plan: Plan, start: int, most: int, survival: float) -> tuple[int, float]:
    """How many of at most `most` guesses the stop rule leaves, going on from `start`; the chance that all survive."""
    least, bound, calibration = plan.min_confidence, plan.min_survival, plan.calibration
    if not bound and not least:
        return most, survival
    count = start
    for confidence in islice(path, start, most):
        count += 1
        survival *= calibrated(confidence, calibration)
        if confidence < least or survival < bound:
            break
    return count, survival


def _survival(path: list[float], plan: Plan, count: int) -> float:
    """The chance that `count` guesses, made already, all survive."""
    return _stopped(path, msgspec.structs.replace(plan, min_confidence=0.0), 0, count, 1.0)[1]


def _offered(path: list[float], plan: Plan, count: int) -> list[int]:
    """How many siblings are named beside each of the first `count` guesses, as long as a forward has room for them."""
    if not plan.siblings:
        return [0] * count
    doubt, room = plan.sibling_confidence, WIDEST - 1 - count
    offered = [plan.siblings if confidence <= doubt else 0 for confidence in islice(path, count)]
    return offered if sum(offered) <= room else [max(0, min(n, room - sum(offered[:i]))) for i, n in enumerate(offered)]
