"""The emulated links of the comparisons, and how near they are to what they are set to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.simulation.links import PACKET_BYTES
from tests.benchmarks.harness.benchmark import Quantity, Values
from tests.emulator.link_conditions import LinkConditions, preset_conditions, recorded_conditions
from tests.emulator.measurement import measure_packet_rate, measure_round_trips, measure_throughput
from tests.emulator.network import Network, Side

MEASURED_PINGS, MEASURED_SECONDS = 60, 3.0
# More than the recorded links let pass, and what is more than that in some seconds.
PACKETS_PER_SECOND, UNLIMITED_QUEUE_BYTES = 5000.0, 1 << 26


RTT = Quantity("RTT set", "ms", digits=1)
MEASURED_RTT = Quantity("measured", "ms", digits=1)
RTT_ERROR = Quantity("error / max(1 ms, 3 %)", goal=1.0)
UP_RATE, DOWN_RATE = Quantity("up set", "Mbit/s"), Quantity("down set", "Mbit/s")
MEASURED_UP, MEASURED_DOWN = Quantity("up measured", "Mbit/s"), Quantity("down measured", "Mbit/s")
RATE_ERROR = Quantity("larger error / 5 %", goal=1.0)
LINK_COLUMNS: tuple[Quantity, ...] = (
    RTT,
    MEASURED_RTT,
    RTT_ERROR,
    UP_RATE,
    MEASURED_UP,
    DOWN_RATE,
    MEASURED_DOWN,
    RATE_ERROR,
)


def link_conditions(link: str) -> list[LinkConditions]:
    """Conditions of a preset, or of a recorded link on top of the delay of 4g."""
    path = Path(link)
    if path.is_absolute() or path.with_suffix(".up").is_file():
        delay = preset_conditions("4g")[0].link.rtt_seconds
        return [recorded_conditions(path.with_suffix(".up"), path.with_suffix(".down"), delay)]
    return preset_conditions(link)


def mean_rate(opportunities: Sequence[int], seconds: tuple[float, float] | None = None) -> float:
    """Bits per second of a recorded link that repeats: in the long run, or between two times after its beginning."""
    period = opportunities[-1] / 1e3
    if seconds is None:
        return 8 * PACKET_BYTES * len(opportunities) / period
    start, end = seconds
    cycles = range(int(start // period), int(end // period) + 1)
    times = np.add.outer([cycle * period for cycle in cycles], np.asarray(opportunities) / 1e3)
    return 8 * PACKET_BYTES * int(((times >= start) & (times < end)).sum()) / (end - start)


def measure_link(network: Network, link: str) -> Values:
    """Compare the delay and the rates of an emulated link with its conditions.

    Without losses, which TCP would measure instead of the rate, and without jitter, of which few echoes give no median.
    """
    [conditions] = link_conditions(link)
    parameters = msgspec.structs.replace(conditions.link, loss=0.0, jitter_seconds=0.0)
    conditions = msgspec.structs.replace(conditions, link=parameters)
    network.set_conditions(conditions)
    trips = measure_round_trips(network, MEASURED_PINGS)
    values = {RTT.name: 1e3 * parameters.rtt_seconds, MEASURED_RTT.name: 1e3 * trips.median}
    if not conditions.up_trace:
        tolerance = max(0.001, 0.03 * parameters.rtt_seconds)
        values[RTT_ERROR.name] = abs(trips.median - parameters.rtt_seconds) / tolerance
    errors = []
    sides: tuple[tuple[Side, tuple[Quantity, Quantity], list[int], float], ...] = (
        ("board", (UP_RATE, MEASURED_UP), conditions.up_trace, parameters.up_rate),
        ("cloud", (DOWN_RATE, MEASURED_DOWN), conditions.down_trace, parameters.down_rate),
    )
    for side, quantities, trace, expected in sides:
        # A queue that never runs empty uses every opportunity of a recorded link.
        queue_bytes = UNLIMITED_QUEUE_BYTES if trace else conditions.queue_bytes
        network.set_conditions(msgspec.structs.replace(conditions, queue_bytes=queue_bytes))
        if trace:
            began, travel = time.monotonic(), parameters.rtt_seconds / 2
            start, end = began + 1, began + 1 + MEASURED_SECONDS
            expected = mean_rate(trace, (1 - travel, 1 + MEASURED_SECONDS - travel))
            per_second = measure_packet_rate(network, side, start, end, PACKETS_PER_SECOND)
            rate = 8 * PACKET_BYTES * per_second
            # What is still queued must not delay what comes.
            network.unplug()
        else:
            # TCP's slow start takes several round trips.
            rate = measure_throughput(network, side, MEASURED_SECONDS, warm_up=1 + 15 * parameters.rtt_seconds)
        values |= {quantities[0].name: expected / 1e6, quantities[1].name: rate / 1e6}
        errors.append(abs(rate / expected - 1) / 0.05)
    return values | {RATE_ERROR.name: max(errors)}
