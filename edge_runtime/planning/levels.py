"""Robust running levels: means that outliers hardly move and that follow a step change within a few observations."""

from __future__ import annotations

import math
from collections import deque

# An observation is odd if it lies further off than so many mean deviations and so large a share of the mean.
DEVIATIONS = 3.0
SHARE = 0.12
# How long what is usual reaches back.
USUAL_SECONDS = 120.0
# After so long without an observation a level may have changed unseen.
UNSEEN_SECONDS = 3.0


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

    def __init__(self, guess: float, *, memory: float = 16.0, patience: float = 2.0, trust: float = 0.5) -> None:
        """
        Args:
            guess: the value before anything was observed.
            memory: how many observations the mean may rest on.
            patience: how many odd observations in a row are a change.
            trust: what the guess weighs, in observations.
        """
        self.value = guess
        self.deviation = SHARE * abs(guess)
        self.weight = trust
        self.changes = 0
        self._memory = memory
        self._patience = patience
        self._odd_sum = 0.0
        self._odd_weight = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self.weight >= 1.0

    def observe(self, value: float, weight: float = 1.0) -> None:
        """Takes in `value`, the mean of `weight` observations."""
        if self.weight < 1.0:
            self.value += weight / (weight + self.weight) * (value - self.value)
            self.deviation = SHARE * abs(self.value)
            self.weight = max(1.0, weight)
            return
        error = value - self.value
        limit = DEVIATIONS * self.deviation + SHARE * abs(self.value)
        if abs(error) <= limit:
            self._settle(limit)
            self._take(error, weight)
            return
        if self._odd_sum * error < 0.0:
            self._settle(limit)
        self._odd_sum += weight * error
        self._odd_weight += weight
        if self._odd_weight >= self._patience:
            self.value += self._odd_sum / self._odd_weight
            self.deviation = SHARE * abs(self.value)
            self.weight = self._odd_weight
            self.changes += 1
            self._odd_sum = self._odd_weight = 0.0

    def believe(self, value: float) -> None:
        """Takes the next observation as it is, should it be odd: `value` is what it will be."""
        if abs(value - self.value) > DEVIATIONS * self.deviation + SHARE * abs(self.value):
            self._odd_sum = self._odd_weight = 0.0
            self.value = value
            self.deviation = SHARE * abs(value)
            self.weight = 1.0

    def scale(self, factor: float) -> None:
        """Moves the level where something else that was observed says it must be by now."""
        self.value *= factor
        self.deviation *= factor

    def _settle(self, limit: float) -> None:
        """Outliers count, as far as they are not odd."""
        if self._odd_weight:
            self._take(math.copysign(limit, self._odd_sum), self._odd_weight)
            self._odd_sum = self._odd_weight = 0.0

    def _take(self, error: float, weight: float) -> None:
        self.weight = min(self.weight + weight, self._memory)
        share = min(1.0, weight / self.weight)
        self.value += share * error
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
        before, changes, above = now.value, now.changes, now.value > self.usual
        if gap > UNSEEN_SECONDS:
            # Nobody saw what was meanwhile, so one observation is as good as many old ones.
            now.believe(value)
        now.observe(value)
        if now.changes > changes:
            if gap <= UNSEEN_SECONDS and self._last > self._since:
                stayed, known = self._last - self._since, self._stays[above]
                self._stays[above] = stayed if math.isinf(known) else known + 0.4 * (stayed - known)
            self._since = time
        elif abs(now.value - before) > SHARE * before and gap > UNSEEN_SECONDS:
            self._since = time
        # What was observed last held for as long as nobody looked, but for no longer than a second.
        seconds = min(max(gap, 0.02), 1.0)
        self._seconds = min(self._seconds + seconds, USUAL_SECONDS)
        self.usual += seconds / self._seconds * (value - self.usual)
        self._last = max(time, self._last)

    def at(self, time: float) -> float:
        """The level to expect at `time`: the further away, the more what is usual, unless it never came back."""
        now = self.now
        above = now.value > self.usual
        stays = self._stays[above]
        if math.isinf(stays) and now.known:
            # What is usual lies between both sides as time is shared between them.
            other = self._levels[not above]
            share = min(max((self.usual - other) / (now.value - other), 0.05), 0.95) if now.value != other else 0.5
            stays = self._stays[not above] * share / (1.0 - share)
        if math.isinf(stays):
            return now.value
        still = math.exp(-max(0.0, time - self._last) / max(stays, 0.1))
        return still * now.value + (1.0 - still) * self.usual


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


class Line:
    """A line through noisy points, leaning towards a slope that is a share of its height; old points count less.

    A step change of the height is noticed as by `Level`, and then only what came since counts.

    Attributes:
        known: whether a point was seen.
        changes: how often the height has changed.
    """

    def __init__(self, guess: float, rise: float, *, kept: float = 0.96) -> None:
        """
        Args:
            guess: the height before a point was seen.
            rise: the slope to lean towards, as a share of the height.
            kept: share kept of old points' weight per point.
        """
        self._rise = rise
        self._kept = kept
        self._guess = guess
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._off: list[tuple[float, float]] = []
        self.changes = 0
        self._fitted: tuple[float, float] = (guess, guess * rise)

    @property
    def known(self) -> bool:
        return self._n > 0.0

    def at(self, x: float) -> float:
        """The line's height at `x`; never less than a quarter of that at the middle of what was seen."""
        height, slope = self._fitted
        return height + slope * (x - self.middle)

    @property
    def middle(self) -> float:
        """Mean x of what was seen."""
        return self._x / self._n if self._n else 1.0

    @property
    def slope(self) -> float:
        return self._fitted[1]

    def observe(self, x: float, y: float) -> None:
        """Takes in a point; `y` must be positive."""
        if self._n:
            expected = self.at(x)
            if abs(y - expected) > 0.4 * expected:
                self._off.append((x, y))
                if len(self._off) < 2:
                    return
                self._n = self._x = self._y = self._xx = self._xy = 0.0
                self.changes += 1
                for point in self._off:
                    self._add(*point)
                self._off.clear()
                self._fit()
                return
            self._off.clear()
        self._add(x, y)
        self._fit()

    def _add(self, x: float, y: float) -> None:
        kept = self._kept
        self._n = self._n * kept + 1.0
        self._x = self._x * kept + x
        self._y = self._y * kept + y
        self._xx = self._xx * kept + x * x
        self._xy = self._xy * kept + x * y

    def _fit(self) -> None:
        x, y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - x * x
        together = self._xy / self._n - x * y
        # The leaning weighs as much as a few points two nodes apart.
        lean = 8.0 / self._n
        slope = (together + lean * self._rise * y) / (spread + lean)
        # A wider forward is never cheaper, and never so much dearer that a narrow one would cost nothing.
        slope = min(max(slope, 0.0), 0.9 * y / max(x, 1.0))
        self._fitted = (y, slope)
