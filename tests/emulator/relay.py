"""The relay process between two TUN devices: forwards every IP packet to the other side after a delay, or drops it.

    python -m tests.emulator.relay BOARD_FD CLOUD_FD SEED      (started by `network`, which opened the devices)

A packet is lost at random, or dropped if the queue is full, or it waits in the queue for its turn at the link's rate
and then travels for half a round-trip time. Packets are never reordered. The same seed loses and delays the same
packets.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from random import Random

import msgspec

from edge_runtime.simulation.links import DeliveryOpportunities
from tests.emulator.control import on_time
from tests.emulator.link_conditions import LinkConditions

MAX_PACKET_BYTES = 2048
TCP = 6
SYN, ACK = 0x02, 0x10
# Packets that are read in one go before due packets are delivered; chosen.
READ_BATCH = 32


class SetConditions(msgspec.Struct, tag=True):
    """Command: apply these conditions one after the other, repeating from the start."""

    conditions: list[LinkConditions]


class ForgetConnections(msgspec.Struct, tag=True):
    """Command: silently drop all packets of the current TCP connections, like a NAT that lost its state."""


class GetCounters(msgspec.Struct, tag=True):
    """Command: only reply with the counters."""


class Counters(msgspec.Struct):
    """What happened since the start: packets of both directions together, and bytes of IP packets.

    Attributes:
        passed: packets delivered.
        lost: packets lost at random.
        dropped: packets that found the queue full.
        cut: packets dropped while unplugged or of a forgotten connection.
        up_bytes, down_bytes: bytes delivered to the cloud and to the board, headers of IP and TCP included.
        payload_bytes: of these, in both directions, what TCP carries, retransmissions included.
    """

    passed: int = 0
    lost: int = 0
    dropped: int = 0
    cut: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    payload_bytes: int = 0


def payload_size(packet: bytes) -> int:
    """Return the bytes that an IPv4 packet carries over TCP; 0 for others."""
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != TCP:
        return 0
    start = 4 * (packet[0] & 0xF)
    return len(packet) - start - 4 * (packet[start + 12] >> 4) if len(packet) > start + 12 else 0


class Flows:
    """Tracks TCP connections: those that may pass, and those that were forgotten."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._forgotten: set[bytes] = set()

    def forget(self) -> None:
        self._forgotten |= self._known
        self._known.clear()

    def may_pass(self, packet: bytes) -> bool:
        """Return whether a packet may pass."""
        if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != TCP:
            return True
        start = 4 * (packet[0] & 0xF)
        if len(packet) < start + 14:
            return True
        ends = sorted((packet[12:16] + packet[start : start + 2], packet[16:20] + packet[start + 2 : start + 4]))
        flow = b"".join(ends)
        if packet[start + 13] & (SYN | ACK) == SYN:
            # A new connection between the same ports.
            self._forgotten.discard(flow)
        if flow in self._forgotten:
            return False
        self._known.add(flow)
        return True


class Direction:
    """One direction of the link.

    Args:
        up: whether it leads from the board to the cloud.
    """

    def __init__(self, source: int, sink: int, seed: int, counters: Counters, *, up: bool) -> None:
        self.source = source
        self.flying: deque[tuple[float, bytes]] = deque()
        self._sink = sink
        self._up = up
        self._random = Random(seed).random
        self._counters = counters
        self._last = 0.0
        self.set_conditions(LinkConditions(), 0.0)

    def set_conditions(self, conditions: LinkConditions, now: float) -> None:
        link = conditions.link
        self._conditions = conditions
        self._rate = link.up_rate if self._up else link.down_rate
        trace = conditions.up_trace if self._up else conditions.down_trace
        self._opportunities = DeliveryOpportunities(trace) if trace else None
        self._began = now
        # Packets already queued keep the departure times of the old rate.
        self._free = now
        self._waiting: deque[tuple[float, int]] = deque()
        self._backlog = 0
        self._losing = False
        if not conditions.plugged:
            self._counters.cut += len(self.flying)
            self.flying.clear()

    def take(self, packet: bytes, now: float) -> None:
        """Accept a packet: lose it, drop it, or schedule its delivery."""
        conditions, link = self._conditions, self._conditions.link
        if not conditions.plugged:
            self._counters.cut += 1
            return
        if link.loss and self._is_lost(link.loss, conditions.burst):
            self._counters.lost += 1
            return
        while self._waiting and self._waiting[0][0] <= now:
            self._backlog -= self._waiting.popleft()[1]
        if self._backlog + len(packet) > conditions.queue_bytes:
            self._counters.dropped += 1
            return
        if self._opportunities:
            leaves = self._began + self._opportunities.take(now - self._began, 1)
        else:
            leaves = self._free = max(self._free, now) + 8 * len(packet) / self._rate
        self._waiting.append((leaves, len(packet)))
        self._backlog += len(packet)
        travel = (link.rtt_seconds + link.jitter_seconds * (2 * self._random() - 1)) / 2
        self._last = max(self._last, leaves + travel)
        self.flying.append((self._last, packet))

    def deliver(self, now: float) -> None:
        """Write out the packets that are due."""
        while self.flying and self.flying[0][0] <= now:
            _, packet = self.flying.popleft()
            # The write fails if the device is down.
            with contextlib.suppress(OSError):
                os.write(self._sink, packet)
                self._counters.passed += 1
                self._counters.payload_bytes += payload_size(packet)
                if self._up:
                    self._counters.up_bytes += len(packet)
                else:
                    self._counters.down_bytes += len(packet)

    def _is_lost(self, loss: float, burst: float) -> bool:
        """Gilbert's model: every loss ends its run with probability 1 / burst; `loss` is the share of lost packets."""
        if burst <= 1:
            return self._random() < loss
        probability = 1 - 1 / burst if self._losing else loss / burst / (1 - loss)
        self._losing = self._random() < probability
        return self._losing


class Relay:
    """Forwards packets in both directions and executes the commands from standard input."""

    def __init__(self, board: int, cloud: int, seed: int) -> None:
        self._counters = Counters()
        self._flows = Flows()
        self._up = Direction(board, cloud, seed, self._counters, up=True)
        self._down = Direction(cloud, board, seed + 1, self._counters, up=False)
        self._set_conditions([LinkConditions()])

    def run(self) -> None:
        """Forward packets until standard input ends."""
        commands = sys.stdin.fileno()
        directions = {self._up.source: self._up, self._down.source: self._down}
        buffered = b""
        while True:
            due = [direction.flying[0][0] for direction in directions.values() if direction.flying]
            wait = max(0.0, min([self._next_change, *due]) - time.monotonic())
            ready, _, _ = select.select([commands, *directions], [], [], min(wait, 60.0))
            for descriptor in ready:
                if descriptor == commands:
                    piece = os.read(commands, 1 << 20)
                    if not piece:
                        return
                    *lines, buffered = (buffered + piece).split(b"\n")
                    for line in lines:
                        self._execute(line)
                else:
                    self._read(directions[descriptor])
            now = time.monotonic()
            if now >= self._next_change:
                self._apply_next(now)
            for direction in directions.values():
                direction.deliver(now)

    def _read(self, direction: Direction) -> None:
        for _ in range(READ_BATCH):
            try:
                packet = os.read(direction.source, MAX_PACKET_BYTES)
            except OSError:
                return
            if self._flows.may_pass(packet):
                direction.take(packet, time.monotonic())
            else:
                self._counters.cut += 1

    def _execute(self, line: bytes) -> None:
        match msgspec.json.decode(line, type=SetConditions | ForgetConnections | GetCounters):
            case SetConditions(conditions):
                self._set_conditions(conditions)
            case ForgetConnections():
                self._flows.forget()
        os.write(sys.stdout.fileno(), msgspec.json.encode(self._counters) + b"\n")

    def _set_conditions(self, conditions: list[LinkConditions]) -> None:
        self._cycle = deque(conditions)
        self._apply_next(time.monotonic())

    def _apply_next(self, now: float) -> None:
        """Apply the next conditions of the cycle."""
        conditions = self._cycle[0]
        self._cycle.rotate(-1)
        self._next_change = now + conditions.seconds if conditions.seconds else float("inf")
        for direction in (self._up, self._down):
            direction.set_conditions(conditions, now)


def main() -> None:
    board, cloud, seed = map(int, sys.argv[1:])
    for descriptor in (board, cloud):
        os.set_blocking(descriptor, False)
    # This process needs little CPU, but must run on time even if the machine is busy.
    with on_time():
        Relay(board, cloud, seed).run()


if __name__ == "__main__":
    main()
