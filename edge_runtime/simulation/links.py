"""Modeled links: transfer times on a simulated clock, deterministic for a seed.

    SteadyLink       one delay with jitter, two rates, loss
    ScheduledLink    other links in sequence, once or repeatedly: step changes, bursts, outages
    RecordedLink     Mahimahi's traces of cellular links, after a propagation delay

Delays are one-way and in seconds, rates in bits per second. A lost packet arrives after a retransmission timeout of
max(200 ms, 2 RTT), which doubles each time it is lost again.
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
# A clock this close to the end of a phase counts as in the next one, so that rounding cannot stall a schedule.
CLOCK_TOLERANCE_SECONDS = 1e-9


class Transfer(NamedTuple):
    """The time that bytes took in one direction, and whether a packet was lost on the way."""

    seconds: float
    lost: bool


class Link(Protocol):
    """A link to the verifier. The clock of successive calls advances, except for steps back within a round."""

    def up(self, now: float, count: int) -> Transfer:
        """Send `count` bytes at `now`, when the link must be available."""

    def down(self, now: float, count: int) -> Transfer:
        """Receive `count` bytes that the verifier sends at `now`, when the link must be available."""

    def available(self, now: float) -> float:
        """Return the first time from `now` on at which the link is up; infinite if it never is."""

    def mean(self, sent: int, received: int) -> float:
        """Return the expected seconds of both directions together, in the long run, while the link is up."""

    @property
    def radio(self) -> str:
        """Kind of radio, as device profiles name it."""


class LinkParameters(msgspec.Struct, frozen=True):
    """Parameters of a steady link.

    Attributes:
        name: display name.
        radio: `ethernet`, `wifi`, `lte` or `5g`.
        rtt_seconds: mean round-trip time of an empty packet.
        jitter_seconds: maximum deviation of the round-trip time; each direction contributes half, uniformly.
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
        """Retransmission timeout in seconds."""
        return max(MIN_RETRANSMIT_SECONDS, 2 * self.rtt_seconds)


class SteadyLink:
    """A link with constant parameters."""

    def __init__(self, parameters: LinkParameters, seed: int) -> None:
        self.parameters = parameters
        self.radio = parameters.radio
        self._random = Random(seed).random
        self._min_seconds = (parameters.rtt_seconds - parameters.jitter_seconds) / 2

    def up(self, now: float, count: int) -> Transfer:
        return self._transfer(count, self.parameters.up_rate)

    def down(self, now: float, count: int) -> Transfer:
        return self._transfer(count, self.parameters.down_rate)

    def available(self, now: float) -> float:
        return now

    def mean(self, sent: int, received: int) -> float:
        parameters = self.parameters
        transmission = 8 * (sent / parameters.up_rate + received / parameters.down_rate)
        lost = sum(count_packets(count) for count in (sent, received)) * parameters.loss * parameters.timeout
        # The timeout doubles at every further loss: loss * timeout * (1 + 2 loss + 4 loss^2 + ...).
        return parameters.rtt_seconds + transmission + lost / (1 - 2 * parameters.loss)

    def _transfer(self, count: int, rate: float) -> Transfer:
        parameters = self.parameters
        seconds = self._min_seconds + parameters.jitter_seconds * self._random() + 8 * count / rate
        if not parameters.loss:
            return Transfer(seconds, False)
        lost = False
        for _ in range(count_packets(count)):
            timeout = parameters.timeout
            while self._random() < parameters.loss:
                seconds += timeout
                timeout *= 2
                lost = True
        return Transfer(seconds, lost)


class LinkPhase(NamedTuple):
    """One phase of a schedule; a `link` of None is an outage."""

    seconds: float
    link: Link | None


class ScheduledLink:
    """Links in sequence. The last phase lasts forever, unless the whole sequence repeats."""

    def __init__(self, phases: list[LinkPhase], *, repeat: bool = False) -> None:
        self._links = [phase.link for phase in phases]
        self._ends = list(accumulate(phase.seconds for phase in phases))
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
        up = [(seconds, link) for seconds, link in zip(lengths, self._links, strict=True) if link]
        total = sum(seconds for seconds, _ in up)
        return sum(seconds * link.mean(sent, received) for seconds, link in up) / total

    def _at(self, now: float) -> Link:
        link = self._links[self._find(now + CLOCK_TOLERANCE_SECONDS)[0]]
        assert link is not None, "call `available` first"
        return link

    def _find(self, now: float) -> tuple[int, float]:
        """Return the index of the phase at `now`, and its end."""
        period = self._ends[-1] if self._repeat else 0.0
        start = now // period * period if period else 0.0
        index = bisect_left(self._ends, now - start)
        if index >= len(self._ends) - 1 and not self._repeat:
            return len(self._ends) - 1, math.inf
        index = min(index, len(self._ends) - 1)
        return index, start + self._ends[index]


class RecordedLink:
    """A recorded cellular link: one packet can pass at each recorded time, and the recording repeats."""

    def __init__(
        self, up: list[int], down: list[int], *, propagation_seconds: float, radio: str = "lte", start: float = 0.0
    ) -> None:
        """
        Args:
            up, down: times in milliseconds at which a packet of 1500 bytes can pass, ascending (`read_opportunities`).
            propagation_seconds: one-way delay before the recorded queue.
            start: position in the recording, in seconds, at which the clock starts.
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
        queued = now + self._start + self._propagation
        return Transfer(opportunities.take(queued, count_packets(count)) - queued + self._propagation, False)


class DeliveryOpportunities:
    """The times at which packets can pass in one direction.

    Attributes:
        mean_wait: mean wait in seconds of a packet that arrives at a random time.
    """

    def __init__(self, milliseconds: list[int]) -> None:
        self._times = [time / 1e3 for time in milliseconds]
        self._period = self._times[-1]
        gaps = [after - before for before, after in zip([0.0, *self._times], self._times, strict=False)]
        self.mean_wait = sum(gap * gap for gap in gaps) / 2 / self._period
        self._next = 0

    def take(self, now: float, count: int) -> float:
        """Use the first `count` unused opportunities from `now` on; return the time of the last of them."""
        cycle = int(now // self._period)
        first = cycle * len(self._times) + bisect_left(self._times, now - cycle * self._period)
        last = max(first, self._next) + count - 1
        self._next = last + 1
        cycles, index = divmod(last, len(self._times))
        return cycles * self._period + self._times[index]


def read_opportunities(path: Path) -> list[int]:
    """Read a Mahimahi trace: milliseconds, one per line, ascending, the last above 0. Raises InputError."""
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
        raise InputError(f"{path} has no time above 0 ms: a link trace has one number of milliseconds per line")
    return times


# Cached, because simulations build the same link repeatedly.
_read_cached = functools.lru_cache(maxsize=8)(read_opportunities)


def count_packets(count: int) -> int:
    """Return the number of packets that carry `count` bytes."""
    return max(1, -(-count // PACKET_BYTES))


# Round-trip time and jitter in seconds, rates up and down in bits per second. Chosen: typical figures of each kind.
LINK_PRESETS = {
    parameters.name: parameters
    for parameters in (
        LinkParameters("lan", "ethernet", rtt_seconds=0.002, jitter_seconds=0.0, up_rate=1e9, down_rate=1e9),
        LinkParameters("wifi", "wifi", rtt_seconds=0.015, jitter_seconds=0.005, up_rate=20e6, down_rate=40e6),
        LinkParameters("5g", "5g", rtt_seconds=0.025, jitter_seconds=0.008, up_rate=30e6, down_rate=120e6),
        LinkParameters("4g", "lte", rtt_seconds=0.055, jitter_seconds=0.020, up_rate=10e6, down_rate=35e6),
        LinkParameters(
            "weak-4g", "lte", rtt_seconds=0.120, jitter_seconds=0.060, up_rate=2e6, down_rate=5e6, loss=0.01
        ),
    )
}
BURSTY_GOOD = LinkParameters("bursty, good", "lte", rtt_seconds=0.040, jitter_seconds=0.0, up_rate=15e6, down_rate=30e6)
BURSTY_BAD = LinkParameters("bursty, bad", "lte", rtt_seconds=0.250, jitter_seconds=0.0, up_rate=2e6, down_rate=5e6)
BURSTY_GOOD_SECONDS, BURSTY_BAD_SECONDS = 8.0, 2.0
PRESET_NAMES = (*LINK_PRESETS, "bursty", "offline")


def make_preset_link(name: str, seed: int) -> Link:
    """Return the preset link of that name. Raises InputError."""
    if name in LINK_PRESETS:
        return SteadyLink(LINK_PRESETS[name], seed)
    if name == "bursty":
        good, bad = SteadyLink(BURSTY_GOOD, seed), SteadyLink(BURSTY_BAD, seed + 1)
        return ScheduledLink([LinkPhase(BURSTY_GOOD_SECONDS, good), LinkPhase(BURSTY_BAD_SECONDS, bad)], repeat=True)
    if name == "offline":
        return ScheduledLink([LinkPhase(1.0, None)])
    raise InputError(f"no link preset {name!r}; there are {', '.join(PRESET_NAMES)}")


def parse_link(text: str, seed: int) -> Link:
    """Parse the notation of `--link`. Raises InputError.

    `4g` is a preset. `wifi:20,offline:5,wifi` is a schedule: each link lasts the given seconds, the last forever.
    `mahimahi:UP:DOWN:MS` is a recording: trace files of the two directions, and the round-trip time added to them.
    """
    if text.startswith("mahimahi:"):
        return _parse_recording(text, seed)
    phases = []
    for index, item in enumerate(text.split(",")):
        name, _, seconds = item.strip().partition(":")
        last = index == text.count(",")
        if bool(seconds) == last or not (last or _is_positive(seconds)):
            raise InputError(
                f"--link {text!r}: every link but the last needs its seconds, as in wifi:20,offline:5,wifi"
            )
        link = None if name == "offline" else make_preset_link(name, seed + index)
        phases.append(LinkPhase(1.0 if last else float(seconds), link))
    if phases[-1].link is None:
        raise InputError(
            f"--link {text!r} ends offline, so no text would ever finish: let the link come back, as in offline:5,4g"
        )
    return ScheduledLink(phases) if len(phases) > 1 else phases[-1].link


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
