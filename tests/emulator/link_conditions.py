"""What a link does to its packets, now and later."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.simulation.links import (
    BAD_SECONDS,
    BAD_SPELL,
    CONDUCTS,
    GOOD_SECONDS,
    GOOD_SPELL,
    Conduct,
    read_opportunities,
)


class Spell(msgspec.Struct, frozen=True):
    """How packets fare for a while.

    Attributes:
        conduct: delay, jitter, rates and loss. Packets never overtake each other, so jitter comes out smaller
            where they follow each other closely.
        burst: packets lost in a row, on average; 1 loses each by itself. Either way `conduct.loss` is lost.
        queue_bytes: that may wait, in each direction, for their turn at the rate; what comes on top is dropped.
        plugged: without, nothing passes, and what is on its way is lost.
        up_trace, down_trace: milliseconds at which a packet may pass (Mahimahi's traces, repeated) instead of a rate.
        seconds: how long it lasts; 0 for ever.
    """

    conduct: Conduct = CONDUCTS["lan"]
    burst: float = 1.0
    queue_bytes: int = 150_000
    plugged: bool = True
    up_trace: list[int] = []
    down_trace: list[int] = []
    seconds: float = 0.0


def steady(rtt: float = 0.02, *, jitter: float = 0.0, rate: float = 20e6, loss: float = 0.0) -> Spell:
    """The same both ways: seconds, bits per second, and a share."""
    return Spell(Conduct("steady", "ethernet", rtt, jitter, rate, rate, loss))


def weather(name: str) -> list[Spell]:
    """One of `edge_runtime.simulation.links.PRESETS`: a spell, or several that repeat."""
    if name == "offline":
        return [Spell(plugged=False)]
    if name == "bursty":
        return [Spell(GOOD_SPELL, seconds=GOOD_SECONDS), Spell(BAD_SPELL, seconds=BAD_SECONDS)]
    return [Spell(CONDUCTS[name])]


def recorded(up: Path, down: Path, rtt: float) -> Spell:
    """A recorded cellular link behind a delay. Raises InputError."""
    conduct = msgspec.structs.replace(CONDUCTS["4g"], name=up.stem, rtt_seconds=rtt, jitter_seconds=0.0)
    return Spell(conduct, up_trace=read_opportunities(up), down_trace=read_opportunities(down))
