"""Modelled links: what a request and its answer take, at any time of a simulated clock, the same for the same seed.

    Steady      one delay with jitter, two rates, loss
    Schedule    other links one after the other, once or for ever: step changes, bursts, outages
    Recorded    Mahimahi's traces of cellular links, behind a propagation delay

Delays are one-way and in seconds, rates in bits per second. A packet that is lost comes after a retransmission timeout
of max(200 ms, 2 RTT), which doubles if it is lost again.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

import msgspec

from edge_runtime.protocol.errors import InputError

PACKET_BYTES = 1500
MIN_RETRANSMIT_SECONDS = 0.2
# How far up or down the clock is from the start of the next part of a schedule before it belongs to that part.
CLOCK_TOLERANCE_SECONDS = 1e-9


class Transfer(NamedTuple):
    """How long bytes took in one direction, and whether a packet was lost on the way."""

    seconds: float
    lost: bool


class Link(Protocol):
    """A way to the verifier. Calls come with a clock that only goes forward, up to a round's length."""

    def up(self, now: float, count: int) -> Transfer:
        """Sends `count` bytes at `now`, at which the link must be available."""

    def down(self, now: float, count: int) -> Transfer:
        """Receives `count` bytes that the verifier sends at `now`, at which the link must be available."""

    def available(self, now: float) -> float:
        """The first time from `now` on at which the link is there; infinite if it never is again."""

    def mean(self, sent: int, received: int) -> float:
        """Expected seconds of both directions together, in the long run, while the link is there."""

    @property
    def radio(self) -> str:
        """What carries it, as device profiles name it."""


class LinkParameters(msgspec.Struct, frozen=True):
    """Figures of a steady link.

    Attributes:
        name: for people.
        radio: `ethernet`, `wifi`, `lte` or `5g`.
        rtt_seconds: mean round-trip time of an empty packet.
        jitter_seconds: the round-trip time is at most this much above or below, each half of it uniformly.
        up_rate, down_rate: bits per second.
        loss: share of packets lost.
    """

    name: str
    radio: str
    rtt_seconds: float
    jitter_seconds: float
    up_rate: float
    down_rate: float
    loss: float = 0.0

    @property
    def timeout(self) -> float:
        """Seconds until a lost packet is sent again."""
        return max(MIN_RETRANSMIT_SECONDS, 2 * self.rtt_seconds)


class SteadyLink:
    """A link whose conduct does not change."""

    def __init__(self, conduct: LinkParameters, seed: int) -> None:
        self.conduct = conduct
        self.radio = conduct.radio
        self._random = Random(seed).random
        self._least = (conduct.rtt_seconds - conduct.jitter_seconds) / 2

    def up(self, now: float, count: int) -> Transfer:
        return self._transfer(count, self.conduct.up_rate)

    def down(self, now: float, count: int) -> Transfer:
        return self._transfer(count, self.conduct.down_rate)

    def available(self, now: float) -> float:
        return now

    def mean(self, sent: int, received: int) -> float:
        conduct = self.conduct
        carrying = 8 * (sent / conduct.up_rate + received / conduct.down_rate)
        lost = sum(count_packets(count) for count in (sent, received)) * conduct.loss * conduct.timeout
        # A timeout that doubles at every further loss: loss * timeout * (1 + 2 loss + 4 loss^2 + ...).
        return conduct.rtt_seconds + carrying + lost / (1 - 2 * conduct.loss)

    def _transfer(self, count: int, rate: float) -> Transfer:
        conduct = self.conduct
        seconds = self._least + conduct.jitter_seconds * self._random() + 8 * count / rate
        if not conduct.loss:
            return Transfer(seconds, False)
        lost = False
        for _ in range(count_packets(count)):
            timeout = conduct.timeout
            while self._random() < conduct.loss:
                seconds += timeout
                timeout *= 2
                lost = True
        return Transfer(seconds, lost)


class LinkPhase(NamedTuple):
    """A stretch of a schedule; `link` None is an outage."""

    seconds: float
    link: Link | None


class ScheduledLink:
    """Links one after the other. The last lasts for ever, unless all of them repeat."""

    def __init__(self, parts: list[LinkPhase], *, repeat: bool = False) -> None:
        self._links = [part.link for part in parts]
        self._ends = list(accumulate(part.seconds for part in parts))
        self._repeat = repeat

    @property
    def radio(self) -> str:
        return next((link.radio for link in self._links if link), "")

    def up(self, now: float, count: int) -> Transfer:
        return self._at(now).up(now, count)

    def down(self, now: float, count: int) -> Transfer:
        return self._at(now).down(now, count)

    def available(self, now: float) -> float:
        index, until = self._find(now)
        while self._links[index] is None:
            if math.isinf(until):
                return until
            now = until
            index, until = self._find(now + CLOCK_TOLERANCE_SECONDS)
        link = self._links[index]
        assert link is not None
        return link.available(now)

    def mean(self, sent: int, received: int) -> float:
        last = self._links[-1]
        if not self._repeat and last:
            return last.mean(sent, received)
        lengths = [end - start for start, end in zip([0.0, *self._ends], self._ends, strict=False)]
        there = [(seconds, link) for seconds, link in zip(lengths, self._links, strict=True) if link]
        whole = sum(seconds for seconds, _ in there)
        return sum(seconds * link.mean(sent, received) for seconds, link in there) / whole

    def _at(self, now: float) -> Link:
        link = self._links[self._find(now + CLOCK_TOLERANCE_SECONDS)[0]]
        assert link is not None, "ask for `available` first"
        return link

    def _find(self, now: float) -> tuple[int, float]:
        """Index of the part at `now`, and when it ends."""
        period = self._ends[-1] if self._repeat else 0.0
        start = now // period * period if period else 0.0
        index = bisect_left(self._ends, now - start)
        if index >= len(self._ends) - 1 and not self._repeat:
            return len(self._ends) - 1, math.inf
        index = min(index, len(self._ends) - 1)
        return index, start + self._ends[index]


class RecordedLink:
    """A recorded cellular link: one packet may pass at each of the recorded times, and the recording repeats.

    Attributes:
        radio: what carried it.
    """

    def __init__(
        self, up: list[int], down: list[int], *, propagation_seconds: float, radio: str = "lte", start: float = 0.0
    ) -> None:
        """
        Args:
            up, down: milliseconds at which a packet of 1500 bytes may pass, in order (`read_opportunities`).
            propagation_seconds: one-way delay in front of the recorded queue.
            start: seconds into the recording at which the clock begins.
        """
        self.radio = radio
        self._propagation = propagation_seconds
        self._start = start
        self._up, self._down = DeliveryOpportunities(up), DeliveryOpportunities(down)

    def up(self, now: float, count: int) -> Transfer:
        return self._transfer(self._up, now, count)

    def down(self, now: float, count: int) -> Transfer:
        return self._transfer(self._down, now, count)

    def available(self, now: float) -> float:
        return now

    def mean(self, sent: int, received: int) -> float:
        waits = self._up.mean_wait * count_packets(sent) + self._down.mean_wait * count_packets(received)
        return 2 * self._propagation + waits

    def _transfer(self, opportunities: DeliveryOpportunities, now: float, count: int) -> Transfer:
        there = now + self._start + self._propagation
        return Transfer(opportunities.take(there, count_packets(count)) - there + self._propagation, False)


class DeliveryOpportunities:
    """When packets may pass in one direction.

    Attributes:
        mean_wait: seconds that a packet coming at a random time waits.
    """

    def __init__(self, milliseconds: list[int]) -> None:
        self._times = [time / 1e3 for time in milliseconds]
        self._period = self._times[-1]
        gaps = [after - before for before, after in zip([0.0, *self._times], self._times, strict=False)]
        self.mean_wait = sum(gap * gap for gap in gaps) / 2 / self._period
        self._next = 0

    def take(self, now: float, count: int) -> float:
        """Uses the first `count` opportunities from `now` on that are not used; the time of the last of them."""
        cycle = int(now // self._period)
        first = cycle * len(self._times) + bisect_left(self._times, now - cycle * self._period)
        last = max(first, self._next) + count - 1
        self._next = last + 1
        cycles, index = divmod(last, len(self._times))
        return cycles * self._period + self._times[index]


def read_opportunities(path: Path) -> list[int]:
    """Milliseconds in a Mahimahi trace: one a line, not falling, the last one above 0. Raises InputError."""
    try:
        lines = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the link trace {path}: {error}") from None
    times: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.isdecimal() or len(line) > 12:
            raise InputError(f"{path}: entry {number} is {line[:40]!r}, not a number of milliseconds")
        times.append(int(line))
        if len(times) > 1 and times[-1] < times[-2]:
            raise InputError(f"{path}: entry {number} goes back in time, from {times[-2]} to {times[-1]} ms")
    if not times or not times[-1]:
        raise InputError(f"{path} holds no time above 0 ms: a link trace has one number of milliseconds a line")
    return times


# Simulations make the same link over and over, each time from its start.
_read_cached = functools.lru_cache(maxsize=8)(read_opportunities)


def count_packets(count: int) -> int:
    """How many packets carry `count` bytes."""
    return max(1, -(-count // PACKET_BYTES))


# DESIGN's presets: round-trip time and jitter in seconds, rates up and down in bits per second.
LINK_PRESETS = {
    conduct.name: conduct
    for conduct in (
        LinkParameters("lan", "ethernet", 0.002, 0.0, 1e9, 1e9),
        LinkParameters("wifi", "wifi", 0.015, 0.005, 20e6, 40e6),
        LinkParameters("5g", "5g", 0.025, 0.008, 30e6, 120e6),
        LinkParameters("4g", "lte", 0.055, 0.020, 10e6, 35e6),
        LinkParameters("weak-4g", "lte", 0.120, 0.060, 2e6, 5e6, loss=0.01),
    )
}
BURSTY_GOOD = LinkParameters("bursty, good", "lte", 0.040, 0.0, 15e6, 30e6)
BURSTY_BAD = LinkParameters("bursty, bad", "lte", 0.250, 0.0, 2e6, 5e6)
BURSTY_GOOD_SECONDS, BURSTY_BAD_SECONDS = 8.0, 2.0
PRESET_NAMES = (*LINK_PRESETS, "bursty", "offline")


def make_preset_link(name: str, seed: int) -> Link:
    """The shipped link of that name. Raises InputError."""
    if name in LINK_PRESETS:
        return SteadyLink(LINK_PRESETS[name], seed)
    if name == "bursty":
        good, bad = SteadyLink(BURSTY_GOOD, seed), SteadyLink(BURSTY_BAD, seed + 1)
        return ScheduledLink([LinkPhase(BURSTY_GOOD_SECONDS, good), LinkPhase(BURSTY_BAD_SECONDS, bad)], repeat=True)
    if name == "offline":
        return ScheduledLink([LinkPhase(1.0, None)])
    raise InputError(f"no link preset {name!r}; there are {', '.join(PRESET_NAMES)}")


def parse_link(text: str, seed: int) -> Link:
    """A link as people write it. Raises InputError.

    `4g` is a make_preset_link. `wifi:20,offline:5,wifi` is a schedule: each link lasts its seconds, the last for ever.
    `mahimahi:UP:DOWN:MS` is a recording: files of the two directions, and the round-trip time in front of them.
    """
    if text.startswith("mahimahi:"):
        return _parse_recording(text, seed)
    parts = []
    for index, item in enumerate(text.split(",")):
        name, _, seconds = item.strip().partition(":")
        last = index == text.count(",")
        if bool(seconds) == last or not (last or _is_positive(seconds)):
            raise InputError(
                f"--link {text!r}: every link but the last takes its seconds, as in wifi:20,offline:5,wifi"
            )
        link = None if name == "offline" else make_preset_link(name, seed + index)
        parts.append(LinkPhase(1.0 if last else float(seconds), link))
    if parts[-1].link is None:
        raise InputError(
            f"--link {text!r} ends offline, where no text is ever done: let it come back, as in offline:5,4g"
        )
    return ScheduledLink(parts) if len(parts) > 1 else parts[-1].link


def _parse_recording(text: str, seed: int) -> Link:
    fields = text.split(":")
    if len(fields) != 4 or not _is_positive(fields[3]):
        raise InputError(f"--link {text!r} is not mahimahi:UP:DOWN:MS, two trace files and a round-trip time in ms")
    up, down = _read_cached(Path(fields[1])), _read_cached(Path(fields[2]))
    start = Random(seed).uniform(0, up[-1] / 1e3)
    return RecordedLink(up, down, propagation_seconds=float(fields[3]) / 2e3, start=start)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
