"""Robust online estimators: means that resist outliers and follow a step change within a few observations."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from itertools import accumulate

# Outlier test: an observation is an outlier if it differs from the mean by more than OUTLIER_DEVIATIONS mean absolute
# deviations plus OUTLIER_SHARE of the mean. Chosen: jitter passes, a change of the link or of the load does not.
OUTLIER_DEVIATIONS = 3.0
OUTLIER_SHARE = 0.12
# Drift test, for changes too small to be outliers: n >= DRIFT_RUN consecutive observations on the same side of the mean
# are a change if their average differs from it by more than DRIFT_DEVIATIONS * sqrt(DRIFT_RUN / n) mean deviations.
DRIFT_RUN = 4
DRIFT_DEVIATIONS = 1.75

# A regime that was never seen to end is expected to last this many times as long as it has lasted so far.
UNENDED_FACTOR = 4.0
# Probability that the last observation is an outlier rather than a change of regime, until the next one decides.
OUTLIER_PROBABILITY = 0.5
# Window of the long-run mean, in seconds.
LONG_RUN_SECONDS = 120.0

# Pieces of a `MonotoneCurve` over x: the upper edge of each, and the x at which its height is kept.
PIECE_EDGES = (1.0, 3.0, 6.0, 10.0, 16.0, 28.0, 72.0)
PIECE_CENTERS = (1.0, 2.5, 5.0, 8.0, 13.0, 22.0, 44.0)
MAX_X = PIECE_EDGES[-1]
# Minimum height of a curve, so that ratios of heights are defined.
MIN_HEIGHT = 1e-6
# A change of load by more than this factor, either way, may have changed the slope as well.
LARGE_CHANGE = 1.25
# Bound of the factor by which one change of load scales a curve, either way.
MAX_LOAD_FACTOR = 100.0


class RobustMean:
    """A mean with exponential forgetting, outlier rejection and change detection.

    The mean is that of at most the last `memory` observations, an exponential moving average from then on. An outlier
    is held back until the next observation. If `patience` consecutive outliers lie on the same side of the mean, the
    level has changed and the mean restarts from them; otherwise they are clipped to the outlier limit and averaged in.
    A long run on one side of the mean restarts it as well (drift test).

    Attributes:
        deviation: mean absolute deviation.
        weight: number of observations that the mean rests on, at most `memory`; below 1 the mean is the initial guess.
        changes: number of step changes detected so far; drifts are not counted.
    """

    def __init__(self, guess: float, *, memory: float = 16.0, patience: float = 2.0, guess_weight: float = 0.0) -> None:
        """
        Args:
            guess: the value before the first observation.
            memory: maximum number of observations that the mean rests on.
            patience: number of consecutive outliers on one side that make a change.
            guess_weight: weight of the guess, in observations, below 1.
        """
        self.value = guess
        self.deviation = OUTLIER_SHARE * abs(guess)
        self.weight = guess_weight
        self.changes = 0
        self._memory = memory
        self._patience = patience
        self._held_sum = 0.0
        self._held_weight = 0.0
        # The current run of observations on one side of the mean: length, side, sum, and the mean and deviation before
        # the run, because the run itself moves both.
        self._run = 0
        self._run_above = False
        self._run_sum = 0.0
        self._before_run = guess, self.deviation

    @property
    def known(self) -> bool:
        """Whether there was an observation."""
        return self.weight >= 1.0

    @property
    def uncertain(self) -> bool:
        """Whether the last observation was an outlier, so that the level may have changed."""
        return self._held_weight > 0.0

    @property
    def outlier_limit(self) -> float:
        """Maximum distance from the mean of an observation that is not an outlier."""
        return OUTLIER_DEVIATIONS * self.deviation + OUTLIER_SHARE * abs(self.value)

    def clip(self, value: float) -> float:
        """Return `value`, or the nearest value that is not an outlier."""
        return min(max(value, self.value - self.outlier_limit), self.value + self.outlier_limit)

    def observe(self, value: float, weight: float = 1.0) -> None:
        """Add `value`, the average of `weight` observations."""
        if self.weight < 1.0:
            share = weight / (weight + self.weight)
            self.value = share * value + (1.0 - share) * self.value
            self.deviation = OUTLIER_SHARE * abs(self.value)
            self.weight = max(1.0, weight)
            return
        # An observation that outweighs all previous ones is never an outlier.
        limit = self.outlier_limit if weight <= self.weight else math.inf
        error = value - self.value
        if abs(error) <= limit:
            self._release_outliers(limit)
            mean, deviation = self.value, self.deviation
            self._average_in(value - self.value, weight)
            self._detect_drift(value, mean, deviation)
            return
        if self._held_weight and (self._held_sum / self._held_weight > self.value) != (error > 0.0):
            self._release_outliers(limit)
        self._held_sum += weight * value
        self._held_weight += weight
        if self._held_weight >= self._patience:
            self.value = self._held_sum / self._held_weight
            self.deviation = OUTLIER_SHARE * abs(self.value)
            self.weight = self._held_weight
            self.changes += 1
            self._held_sum = self._held_weight = self._run_sum = 0.0
            self._run = 0

    def scale(self, factor: float) -> None:
        """Scale the mean, because a related quantity has changed by `factor`."""
        self.value *= factor
        self.deviation *= factor
        self._held_sum *= factor
        self._run_sum *= factor
        self._before_run = factor * self._before_run[0], factor * self._before_run[1]

    def _detect_drift(self, value: float, mean: float, deviation: float) -> None:
        """Restart the mean from the current run if that passes the drift test.

        Args:
            value: the observation that was just averaged in.
            mean, deviation: the estimates before that.
        """
        above = value > mean
        if above != self._run_above or not self._run:
            self._run, self._run_above, self._run_sum = 0, above, 0.0
            self._before_run = mean, deviation
        self._run += 1
        self._run_sum += value
        run_mean = self._run_sum / self._run
        mean_before, deviation_before = self._before_run
        limit = DRIFT_DEVIATIONS * deviation_before
        if self._run >= DRIFT_RUN and abs(run_mean - mean_before) > limit * math.sqrt(DRIFT_RUN / self._run):
            self.value, self.weight = run_mean, float(self._run)
            self.deviation = min(self.deviation, deviation_before)
            self._run, self._run_sum = 0, 0.0

    def _release_outliers(self, limit: float) -> None:
        """Average in the outliers held back, clipped to `limit`."""
        if self._held_weight:
            error = self._held_sum / self._held_weight - self.value
            self._average_in(min(max(error, -limit), limit), self._held_weight)
            self._held_sum = self._held_weight = 0.0

    def _average_in(self, error: float, weight: float) -> None:
        self.weight = min(self.weight + weight, self._memory)
        share = min(1.0, weight / self.weight)
        self.value = share * (self.value + error) + (1.0 - share) * self.value
        self.deviation += share * (abs(error) - self.deviation)


class TwoRegimeMean:
    """A level that alternates between two regimes, such as a bursty link: its value now and its forecast.

    The regimes are the values above and below the long-run mean. Regimes are taken to end at a constant rate, so that
    the probability that the current one still holds after t seconds is exp(-t / expected duration); the duration is an
    exponential moving average per regime.

    Attributes:
        now: the current level.
        long_run: time-weighted mean over the last minutes of observation.
    """

    def __init__(self, guess: float) -> None:
        self.now = RobustMean(guess)
        self.long_run = guess
        self._observed_seconds = 0.0
        self._last = self._since = math.nan
        # By regime (True: above the long-run mean): the average duration, infinite if it was never seen to end, and the
        # last level.
        self._durations = {True: math.inf, False: math.inf}
        self._levels = {True: guess, False: guess}

    def observe(self, value: float, time: float) -> None:
        """Add `value`, observed at `time` in seconds."""
        now = self.now
        if not now.known:
            self._last = self._since = time
            self.long_run = value
        gap = max(0.0, time - self._last)
        self._levels[now.value > self.long_run] = now.value
        changes, above = now.changes, now.value > self.long_run
        # If the regime has probably ended by now, a single outlier counts as a change.
        now.observe(value, 1.0 if self.persistence(time) >= OUTLIER_PROBABILITY else 2.0)
        if now.changes > changes:
            # The change happened between the last observation and this one; take the middle.
            duration, average = (self._last + time) / 2 - self._since, self._durations[above]
            self._durations[above] = duration if math.isinf(average) else average + 0.4 * (duration - average)
            self._since = time
        # An observation counts for the time since the previous one, between 20 ms and a second.
        seconds = min(max(gap, 0.02), 1.0)
        self._observed_seconds = min(self._observed_seconds + seconds, LONG_RUN_SECONDS)
        self.long_run += seconds / self._observed_seconds * (now.clip(value) - self.long_run)
        self._last = max(time, self._last)

    def forecast(self, time: float) -> float:
        """Return the expected level at `time`: from the current level towards the long-run mean."""
        persistence = self.persistence(time)
        return persistence * self.now.value + (1.0 - persistence) * self.long_run

    def persistence(self, time: float) -> float:
        """Return the probability that the current level still holds at `time`."""
        duration = self.expected_duration
        persistence = 1.0 if math.isinf(duration) else math.exp(-max(0.0, time - self._last) / duration)
        return OUTLIER_PROBABILITY * persistence if self.now.uncertain else persistence

    @property
    def expected_duration(self) -> float:
        """Expected duration of the current regime in seconds; infinite if no regime was ever seen to end."""
        now = self.now
        above = now.value > self.long_run
        duration = self._durations[above]
        if math.isinf(duration) and now.known:
            # The long-run mean divides the distance between both levels in proportion to the time spent in each.
            other = self._levels[not above]
            share = min(max((self.long_run - other) / (now.value - other), 0.05), 0.95) if now.value != other else 0.5
            # The longer the regime has lasted, the longer it is expected to last.
            duration = max(
                self._durations[not above] * share / (1.0 - share), UNENDED_FACTOR * (self._last - self._since)
            )
        return max(duration, 0.1)

    @property
    def other_level(self) -> float:
        """The last level of the other regime."""
        return self._levels[self.now.value <= self.long_run]


class RecentValues:
    """The last few observations, for quantiles."""

    def __init__(self, size: int = 24) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def observe(self, value: float) -> None:
        self._values.append(value)

    def keep_last(self, count: int) -> None:
        """Drop all but the last `count` observations, after a change of the level."""
        while len(self._values) > count:
            self._values.popleft()

    def quantile(self, share: float, default: float) -> float:
        """Return the value that `share` of the observations do not exceed; `default` without observations."""
        if not self._values:
            return default
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class MonotoneCurve:
    """A non-decreasing, piecewise linear curve through noisy points, with exponential forgetting.

    Each piece of the x axis has a `RobustMean` of its height at the piece's center. A step change of one piece scales
    all of them by the same factor: what has changed is the load.

    Attributes:
        known: whether a point was observed.
        changes: number of step changes detected so far.
        change_factor: the factor of the last one.
        knots: (x, y) of the observed pieces and of both ends.
    """

    def __init__(self, guess: float, slope: float, *, forget_after: int = 0) -> None:
        """
        Args:
            guess: the height before the first point.
            slope: assumed increase per unit of x, as a share of the height, outside of the observed pieces.
            forget_after: points after which a piece that got none of them is not observed any more, so that whoever
                chooses x by the curve tries it again; likewise all others after a large change of one. 0 for never.
        """
        self._guess, self._slope, self._forget_after = guess, slope, forget_after
        self._means = [RobustMean(guess) for _ in PIECE_CENTERS]
        # Points since the latest one of each piece.
        self._ages = [0] * len(PIECE_CENTERS)
        self.known = False
        self.changes = 0
        self.change_factor = 1.0
        self.knots: tuple[list[float], list[float]] = ([], [])
        self._update_knots()

    def at(self, x: float) -> float:
        """Return the height at `x`, from 1 to `MAX_X`."""
        xs, ys = self.knots
        index = min(bisect_right(xs, x), len(xs) - 1)
        left, low = xs[index - 1], ys[index - 1]
        return low + (ys[index] - low) * (x - left) / (xs[index] - left)

    def observe(self, x: float, y: float) -> None:
        """Add a point; heights below `MIN_HEIGHT` are raised to it."""
        y = max(y, MIN_HEIGHT)
        piece = bisect_left(PIECE_EDGES, min(x, MAX_X))
        mean = self._means[piece]
        before, changes = mean.value, mean.changes
        mean.observe(y * self.at(PIECE_CENTERS[piece]) / self.at(x) if mean.known else y)
        self.known = True
        self._ages = [age + 1 for age in self._ages]
        self._ages[piece] = 0
        if self._forget_after:
            self._means = [
                RobustMean(self._guess) if age > self._forget_after else each
                for each, age in zip(self._means, self._ages, strict=True)
            ]
        if mean.changes > changes:
            self.changes += 1
            self.change_factor = min(max(mean.value / before, 1.0 / MAX_LOAD_FACTOR), MAX_LOAD_FACTOR)
            is_large = not 1.0 / LARGE_CHANGE < self.change_factor < LARGE_CHANGE
            for index, other in enumerate(self._means):
                if other is mean:
                    continue
                if self._forget_after and is_large:
                    self._means[index] = RobustMean(self._guess)
                else:
                    other.scale(self.change_factor)
        self._update_knots()

    def _update_knots(self) -> None:
        seen = [(x, mean.value) for x, mean in zip(PIECE_CENTERS, self._means, strict=True) if mean.known]
        if not seen:
            seen = [(1.0, self._means[0].value)]
        xs, ys = [x for x, _ in seen], list(accumulate((y for _, y in seen), max))
        if xs[0] > 1.0:
            # Extrapolate to x = 1 with 0.7 of the first segment's slope, at least the assumed one, and a lower bound.
            slope = self._slope * ys[0]
            if len(xs) > 1:
                slope = max(slope, 0.7 * (ys[1] - ys[0]) / (xs[1] - xs[0]))
            ys.insert(0, max(ys[0] - slope * (xs[0] - 1.0), 0.3 * ys[0]))
            xs.insert(0, 1.0)
        if xs[-1] < MAX_X:
            slope = self._slope * ys[-1]
            if len(xs) > 1:
                slope = max(slope, 0.4 * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
            ys.append(ys[-1] + slope * (MAX_X - xs[-1]))
            xs.append(MAX_X)
        self.knots = (xs, ys)
