"""Conditions of an emulated link: delay, jitter, rate, loss, queue, and how long they last."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.simulation.links import (
    BURSTY_BAD,
    BURSTY_BAD_SECONDS,
    BURSTY_GOOD,
    BURSTY_GOOD_SECONDS,
    LINK_PRESETS,
    LinkParameters,
    read_opportunities,
)


class LinkConditions(msgspec.Struct, frozen=True):
    """The conditions of a link for a period of time.

    Attributes:
        link: delay, jitter, rates and loss. Packets are never reordered, so the observed jitter is smaller if they
            follow each other closely.
        burst: mean number of packets lost in a row; 1 makes losses independent. The share `link.loss` stays the same.
        queue_bytes: capacity of the queue in each direction; packets that do not fit are dropped.
        plugged: if False, all packets are dropped, including those in flight.
        up_trace, down_trace: milliseconds at which a packet may pass (Mahimahi traces, repeated), instead of a rate.
        seconds: duration; 0 means forever.
    """

    link: LinkParameters = LINK_PRESETS["lan"]
    burst: float = 1.0
    queue_bytes: int = 150_000
    plugged: bool = True
    up_trace: list[int] = []
    down_trace: list[int] = []
    seconds: float = 0.0


def steady_conditions(
    rtt: float = 0.02, *, jitter: float = 0.0, rate: float = 20e6, loss: float = 0.0
) -> LinkConditions:
    """Return constant conditions, equal in both directions: seconds, bits per second, and a share of lost packets."""
    return LinkConditions(
        LinkParameters(
            name="steady",
            radio="ethernet",
            rtt_seconds=rtt,
            jitter_seconds=jitter,
            up_rate=rate,
            down_rate=rate,
            loss=loss,
        )
    )


def preset_conditions(name: str) -> list[LinkConditions]:
    """Return a preset of `edge_runtime.simulation.links`: one set of conditions, or several that repeat."""
    if name == "offline":
        return [LinkConditions(plugged=False)]
    if name == "bursty":
        return [
            LinkConditions(BURSTY_GOOD, seconds=BURSTY_GOOD_SECONDS),
            LinkConditions(BURSTY_BAD, seconds=BURSTY_BAD_SECONDS),
        ]
    return [LinkConditions(LINK_PRESETS[name])]


def recorded_conditions(up: Path, down: Path, rtt: float) -> LinkConditions:
    """Return a recorded cellular link with a fixed delay. Raises InputError for a malformed trace."""
    link = msgspec.structs.replace(LINK_PRESETS["4g"], name=up.stem, rtt_seconds=rtt, jitter_seconds=0.0)
    return LinkConditions(link, up_trace=read_opportunities(up), down_trace=read_opportunities(down))
