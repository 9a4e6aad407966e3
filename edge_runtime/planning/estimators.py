"""Robust running levels: means that outliers hardly move and that follow a step change within a few observations."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from itertools import accumulate

# A side that was never left will be stayed on for so many times as long as it has been.
LINGERS = 4.0
# The chance that an odd observation is no change.
EVEN = 0.5
# Where a curve's pieces end, and their middles.
EDGES = (1.0, 3.0, 6.0, 10.0, 16.0, 28.0, 72.0)
CENTRES = (1.0, 2.5, 5.0, 8.0, 13.0, 22.0, 44.0)
WIDEST = EDGES[-1]
# The least height of a curve, so that heights can be compared.
LEAST = 1e-6
# No load makes a forward so many times slower.
MOST_LOAD = 100.0
# An observation is odd if it lies further off than so many mean deviations and so large a share of the mean.
DEVIATIONS = 3.0
SHARE = 0.12
# So many observations in a row on one side, by so many mean deviations on average, are a change, too; more of them by
# less.
RUN = 4
DRIFT = 1.75
# How long what is usual reaches back.
USUAL_SECONDS = 120.0


class Level:
    """A slowly forgetting mean with its mean absolute deviation.

    Observations that lie far off wait for the next: if that lies off on the same side, the level has changed, and the
    mean starts anew from them; if not, they were outliers and count for no more than what is not odd.

    Attributes:
        value: the mean.
        deviation: mean absolute deviation.
        weight: observations that the mean rests on, at most the memory; below 1 it is a guess.
        changes: how often the level has changed.
    """

    def __init__(self, guess: float, *, memory: float = 16.0, patience: float = 2.0, trust: float = 0.0) -> None:
        """
        Args:
            guess: the value before anything was observed.
            memory: how many observations the mean may rest on.
            patience: how many odd observations in a row are a change.
            trust: what the guess weighs, in observations, below 1.
        """
        self.value = guess
        self.deviation = SHARE * abs(guess)
        self.weight = trust
        self.changes = 0
        self._memory = memory
        self._patience = patience
        self._odd_sum = 0.0
        self._odd_weight = 0.0
        # Observations in a row on one side of the mean: how many, above or below, their sum, and mean and deviation
        # in front of them: the run moves both.
        self._run = 0
        self._run_above = False
        self._run_sum = 0.0
        self._run_from = guess, self.deviation

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self.weight >= 1.0

    @property
    def doubtful(self) -> bool:
        """Whether the last observation was odd, so that the level may have changed."""
        return self._odd_weight > 0.0

    @property
    def reach(self) -> float:
        """How far from the mean an observation may be without being odd."""
        return DEVIATIONS * self.deviation + SHARE * abs(self.value)

    def clipped(self, value: float) -> float:
        """`value`, or the nearest that is not odd."""
        return min(max(value, self.value - self.reach), self.value + self.reach)

    def observe(self, value: float, weight: float = 1.0) -> None:
        """Takes in `value`, the mean of `weight` observations."""
        if self.weight < 1.0:
            share = weight / (weight + self.weight)
            self.value = share * value + (1.0 - share) * self.value
            self.deviation = SHARE * abs(self.value)
            self.weight = max(1.0, weight)
            return
        # What weighs more than all before it is not odd.
        limit = self.reach if weight <= self.weight else math.inf
        error = value - self.value
        if abs(error) <= limit:
            self._settle(limit)
            before, deviation = self.value, self.deviation
            self._take(value - self.value, weight)
            self._drift(value, before, deviation)
            return
        if self._odd_weight and (self._odd_sum / self._odd_weight > self.value) != (error > 0.0):
            self._settle(limit)
        self._odd_sum += weight * value
        self._odd_weight += weight
        if self._odd_weight >= self._patience:
            self.value = self._odd_sum / self._odd_weight
            self.deviation = SHARE * abs(self.value)
            self.weight = self._odd_weight
            self.changes += 1
            self._odd_sum = self._odd_weight = self._run_sum = 0.0
            self._run = 0

    def scale(self, factor: float) -> None:
        """Moves the level where something else that was observed says it must be by now."""
        self.value *= factor
        self.deviation *= factor
        self._odd_sum *= factor
        self._run_sum *= factor
        self._run_from = factor * self._run_from[0], factor * self._run_from[1]

    def _drift(self, value: float, before: float, deviation: float) -> None:
        """Starts anew from a long run on one side: the level has changed by less than what is odd."""
        above = value > before
        if above != self._run_above or not self._run:
            self._run, self._run_above, self._run_sum = 0, above, 0.0
            self._run_from = before, deviation
        self._run += 1
        self._run_sum += value
        mean = self._run_sum / self._run
        was, deviation = self._run_from
        if self._run >= RUN and abs(mean - was) > DRIFT * deviation * math.sqrt(RUN / self._run):
            self.value, self.weight = mean, float(self._run)
            self.deviation = min(self.deviation, deviation)
            self._run, self._run_sum = 0, 0.0

    def _settle(self, limit: float) -> None:
        """Outliers count, as far as they are not odd."""
        if self._odd_weight:
            error = self._odd_sum / self._odd_weight - self.value
            self._take(min(max(error, -limit), limit), self._odd_weight)
            self._odd_sum = self._odd_weight = 0.0

    def _take(self, error: float, weight: float) -> None:
        self.weight = min(self.weight + weight, self._memory)
        share = min(1.0, weight / self.weight)
        self.value = share * (self.value + error) + (1.0 - share) * self.value
        self.deviation += share * (abs(error) - self.deviation)


class Wandering:
    """A level that changes now and then, and comes back: what it is now, and what it will be after a while.

    Attributes:
        now: the level now.
        usual: mean over the last minutes of observation.
    """

    def __init__(self, guess: float) -> None:
        self.now = Level(guess)
        self.usual = guess
        self._seconds = 0.0
        self._last = self._since = math.nan
        # How long it stayed above and below what is usual, on average, infinite if it was not seen to leave; and where.
        self._stays = {True: math.inf, False: math.inf}
        self._levels = {True: guess, False: guess}

    def observe(self, value: float, time: float) -> None:
        """Takes in `value`, observed at `time` in seconds."""
        now = self.now
        if not now.known:
            self._last = self._since = time
            self.usual = value
        gap = max(0.0, time - self._last)
        self._levels[now.value > self.usual] = now.value
        changes, above = now.changes, now.value > self.usual
        # Where a change is more likely than not by now, one odd observation is enough.
        now.observe(value, 1.0 if self.still(time) >= EVEN else 2.0)
        if now.changes > changes:
            # It changed at some time between the last observation and this one.
            stayed, known = (self._last + time) / 2 - self._since, self._stays[above]
            self._stays[above] = stayed if math.isinf(known) else known + 0.4 * (stayed - known)
            self._since = time
        # What was observed last held for as long as nobody looked, but for no longer than a second.
        seconds = min(max(gap, 0.02), 1.0)
        self._seconds = min(self._seconds + seconds, USUAL_SECONDS)
        self.usual += seconds / self._seconds * (now.clipped(value) - self.usual)
        self._last = max(time, self._last)

    def at(self, time: float) -> float:
        """The level to expect at `time`: the further away, the more what is usual, unless it never came back."""
        still = self.still(time)
        return still * self.now.value + (1.0 - still) * self.usual

    def still(self, time: float) -> float:
        """The chance that the level will not have changed until `time`."""
        stays = self.stays
        still = 1.0 if math.isinf(stays) else math.exp(-max(0.0, time - self._last) / stays)
        return EVEN * still if self.now.doubtful else still

    @property
    def stays(self) -> float:
        """Seconds for which the level stays what it is, on average; infinite if it was never seen to change."""
        now = self.now
        above = now.value > self.usual
        stays = self._stays[above]
        if math.isinf(stays) and now.known:
            # What is usual lies between both sides as time is shared between them.
            other = self._levels[not above]
            share = min(max((self.usual - other) / (now.value - other), 0.05), 0.95) if now.value != other else 0.5
            # The longer it has stayed already, the longer it will.
            stays = max(self._stays[not above] * share / (1.0 - share), LINGERS * (self._last - self._since))
        return max(stays, 0.1)

    @property
    def other(self) -> float:
        """The level on the other side of what is usual, when it was last there."""
        return self._levels[self.now.value <= self.usual]


class Recent:
    """The last observations, for quantiles where a mean would mislead."""

    def __init__(self, size: int = 24) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def observe(self, value: float) -> None:
        self._values.append(value)

    def forget(self, kept: int) -> None:
        """Forgets all but the latest `kept`: the level has changed."""
        while len(self._values) > kept:
            self._values.popleft()

    def quantile(self, share: float, default: float) -> float:
        """The value that `share` of them do not exceed; `default` if there are none."""
        if not self._values:
            return default
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Curve:
    """A never-falling curve through noisy points, piecewise straight between `CENTRES`; old points count less.

    Each piece has a level of its own. A step change of one of them moves all: what has changed is the load.

    Attributes:
        known: whether a point was seen.
        changes: how often a level has changed, and `factor`, by how much it last did.
        knots: (x, y) of the pieces that were seen, and of both ends.
    """

    def __init__(self, guess: float, rise: float) -> None:
        """
        Args:
            guess: the height before a point was seen.
            rise: how much the curve rises for each unit of x where nobody has seen it, as a share of its height.
        """
        self._rise = rise
        self._levels = [Level(guess) for _ in CENTRES]
        self.known = False
        self.changes = 0
        self.factor = 1.0
        self.knots: tuple[list[float], list[float]] = ([], [])
        self._draw()

    def at(self, x: float) -> float:
        """The curve's height at `x`, from 1 to `WIDEST`."""
        xs, ys = self.knots
        index = min(bisect_right(xs, x), len(xs) - 1)
        left, low = xs[index - 1], ys[index - 1]
        return low + (ys[index] - low) * (x - left) / (xs[index] - left)

    def observe(self, x: float, y: float) -> None:
        """Takes in a point; what is below LEAST counts as that."""
        y = max(y, LEAST)
        piece = bisect_left(EDGES, min(x, WIDEST))
        level = self._levels[piece]
        before, changes = level.value, level.changes
        level.observe(y * self.at(CENTRES[piece]) / self.at(x) if level.known else y)
        self.known = True
        if level.changes > changes:
            self.changes += 1
            self.factor = min(max(level.value / before, 1.0 / MOST_LOAD), MOST_LOAD)
            for other in self._levels:
                if other is not level:
                    other.scale(self.factor)
        self._draw()

    def _draw(self) -> None:
        seen = [(x, level.value) for x, level in zip(CENTRES, self._levels, strict=True) if level.known]
        if not seen:
            seen = [(1.0, self._levels[0].value)]
        xs, ys = [x for x, _ in seen], list(accumulate((y for _, y in seen), max))
        if xs[0] > 1.0:
            # Towards a single node: straight on, leaning towards the usual rise, and never down to nothing.
            slope = self._rise * ys[0]
            if len(xs) > 1:
                slope = max(slope, 0.7 * (ys[1] - ys[0]) / (xs[1] - xs[0]))
            ys.insert(0, max(ys[0] - slope * (xs[0] - 1.0), 0.3 * ys[0]))
            xs.insert(0, 1.0)
        if xs[-1] < WIDEST:
            slope = self._rise * ys[-1]
            if len(xs) > 1:
                slope = max(slope, 0.4 * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
            ys.append(ys[-1] + slope * (WIDEST - xs[-1]))
            xs.append(WIDEST)
        self.knots = (xs, ys)
