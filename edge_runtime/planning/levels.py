"""Robust running levels: means that outliers hardly move and that follow a step change within a few observations."""

from __future__ import annotations

from collections import deque


class Level:
    """A slowly forgetting mean with its mean absolute deviation.

    An observation far from the mean is clipped; when `patience` observations in a row lie far off on the same side,
    the level has changed, and the mean starts anew from them.

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
            patience: see above.
            trust: what the guess weighs, in observations.
        """
        self.value = guess
        self.deviation = 0.25 * abs(guess)
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
            share = weight / (weight + self.weight)
            self.value += share * (value - self.value)
            self.deviation = 0.15 * abs(self.value)
            self.weight = max(1.0, weight)
            return
        error = value - self.value
        limit = 4.0 * self.deviation + 0.12 * abs(self.value)
        if abs(error) > limit:
            if self._odd_sum * error < 0.0:
                self._odd_sum = self._odd_weight = 0.0
            self._odd_sum += weight * error
            self._odd_weight += weight
            if self._odd_weight >= self._patience:
                self.value += self._odd_sum / self._odd_weight
                self.deviation = 0.15 * abs(self.value)
                self.weight = self._odd_weight
                self._odd_sum = self._odd_weight = 0.0
                self.changes += 1
                return
            error = limit if error > 0.0 else -limit
        else:
            self._odd_sum = self._odd_weight = 0.0
        self.weight = min(self.weight + weight, self._memory)
        share = min(1.0, weight / self.weight)
        self.value += share * error
        self.deviation += share * (abs(error) - self.deviation)

    def scale(self, factor: float) -> None:
        """Moves the level where something else that was observed says it must be by now."""
        self.value *= factor
        self.deviation *= factor


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
