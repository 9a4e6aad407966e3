"""The process between two TUN devices: takes every IP packet, and gives it to the other side later, or never.

    python -m tests.emulator.relay BOARD_FD CLOUD_FD SEED      (started by `network`, which opened the devices)

A packet is lost, or dropped where too many bytes wait already, or it waits for its turn at the link's rate, travels for
half a round-trip time, and never overtakes another. The same seed loses and delays the same packets.
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

from edge_runtime.simulation.links import Opportunities
from tests.emulator.weather import Spell

BIGGEST = 2048
TCP = 6
SYN, ACK = 0x02, 0x10
# Packets that are read before others are delivered.
AT_ONCE = 32


class Become(msgspec.Struct, tag=True):
    """From now on: these spells one after the other, over and over."""

    spells: list[Spell]


class Forget(msgspec.Struct, tag=True):
    """As a NAT does: of all TCP connections known now, no packet passes any more, and nobody is told."""


class Count(msgspec.Struct, tag=True):
    """Only tell the counters."""


class Counters(msgspec.Struct):
    """Packets since the start, both directions together.

    Attributes:
        passed: delivered.
        lost: by chance.
        dropped: the queue was full.
        cut: unplugged, or of a forgotten connection.
        bytes: delivered.
    """

    passed: int = 0
    lost: int = 0
    dropped: int = 0
    cut: int = 0
    bytes: int = 0


class Flows:
    """TCP connections that pass, and those that are forgotten."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._forgotten: set[bytes] = set()

    def forget(self) -> None:
        self._forgotten |= self._known
        self._known.clear()

    def pass_through(self, packet: bytes) -> bool:
        """Whether a packet may pass."""
        if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != TCP:
            return True
        start = 4 * (packet[0] & 0xF)
        if len(packet) < start + 14:
            return True
        ends = sorted((packet[12:16] + packet[start : start + 2], packet[16:20] + packet[start + 2 : start + 4]))
        flow = b"".join(ends)
        if packet[start + 13] & (SYN | ACK) == SYN:
            # A new connection, if between old ports.
            self._forgotten.discard(flow)
        if flow in self._forgotten:
            return False
        self._known.add(flow)
        return True


class Direction:
    """One way through the link.

    Args:
        up: from the board to the cloud.
    """

    def __init__(self, source: int, sink: int, seed: int, counters: Counters, *, up: bool) -> None:
        self.source = source
        self.flying: deque[tuple[float, bytes]] = deque()
        self._sink = sink
        self._up = up
        self._random = Random(seed).random
        self._counters = counters
        self._last = 0.0
        self.become(Spell(), 0.0)

    def become(self, spell: Spell, now: float) -> None:
        conduct = spell.conduct
        self._spell = spell
        self._rate = conduct.up_rate if self._up else conduct.down_rate
        trace = spell.up_trace if self._up else spell.down_trace
        self._opportunities = Opportunities(trace) if trace else None
        self._began = now
        # What waited goes on at the old rate: it is on its way.
        self._free = now
        self._waiting: deque[tuple[float, int]] = deque()
        self._backlog = 0
        self._losing = False
        if not spell.plugged:
            self._counters.cut += len(self.flying)
            self.flying.clear()

    def take(self, packet: bytes, now: float) -> None:
        """A packet comes in."""
        spell, conduct = self._spell, self._spell.conduct
        if not spell.plugged:
            self._counters.cut += 1
            return
        if conduct.loss and self._loses(conduct.loss, spell.burst):
            self._counters.lost += 1
            return
        while self._waiting and self._waiting[0][0] <= now:
            self._backlog -= self._waiting.popleft()[1]
        if self._backlog + len(packet) > spell.queue_bytes:
            self._counters.dropped += 1
            return
        if self._opportunities:
            leaves = self._began + self._opportunities.take(now - self._began, 1)
        else:
            leaves = self._free = max(self._free, now) + 8 * len(packet) / self._rate
        self._waiting.append((leaves, len(packet)))
        self._backlog += len(packet)
        travel = (conduct.rtt_seconds + conduct.jitter_seconds * (2 * self._random() - 1)) / 2
        self._last = max(self._last, leaves + travel)
        self.flying.append((self._last, packet))

    def deliver(self, now: float) -> None:
        """Packets whose time has come go out."""
        while self.flying and self.flying[0][0] <= now:
            _, packet = self.flying.popleft()
            # A device that is down, or a sender that left, takes none.
            with contextlib.suppress(OSError):
                os.write(self._sink, packet)
                self._counters.passed += 1
                self._counters.bytes += len(packet)

    def _loses(self, loss: float, burst: float) -> bool:
        """Gilbert's model: every loss is the last in its row with chance 1 / burst; `loss` of all packets are lost."""
        if burst <= 1:
            return self._random() < loss
        chance = 1 - 1 / burst if self._losing else loss / burst / (1 - loss)
        self._losing = self._random() < chance
        return self._losing


class Relay:
    """Both directions, and the orders that change them."""

    def __init__(self, board: int, cloud: int, seed: int) -> None:
        self._counters = Counters()
        self._flows = Flows()
        self._up = Direction(board, cloud, seed, self._counters, up=True)
        self._down = Direction(cloud, board, seed + 1, self._counters, up=False)
        self._become([Spell()])

    def run(self) -> None:
        """Until standard input ends."""
        orders = sys.stdin.fileno()
        directions = {self._up.source: self._up, self._down.source: self._down}
        buffered = b""
        while True:
            due = [direction.flying[0][0] for direction in directions.values() if direction.flying]
            wait = max(0.0, min([self._turns, *due]) - time.monotonic())
            ready, _, _ = select.select([orders, *directions], [], [], min(wait, 60.0))
            for descriptor in ready:
                if descriptor == orders:
                    piece = os.read(orders, 1 << 20)
                    if not piece:
                        return
                    *lines, buffered = (buffered + piece).split(b"\n")
                    for line in lines:
                        self._obey(line)
                else:
                    self._read(directions[descriptor])
            now = time.monotonic()
            if now >= self._turns:
                self._turn(now)
            for direction in directions.values():
                direction.deliver(now)

    def _read(self, direction: Direction) -> None:
        for _ in range(AT_ONCE):
            try:
                packet = os.read(direction.source, BIGGEST)
            except OSError:
                return
            if self._flows.pass_through(packet):
                direction.take(packet, time.monotonic())
            else:
                self._counters.cut += 1

    def _obey(self, line: bytes) -> None:
        match msgspec.json.decode(line, type=Become | Forget | Count):
            case Become(spells):
                self._become(spells)
            case Forget():
                self._flows.forget()
        os.write(sys.stdout.fileno(), msgspec.json.encode(self._counters) + b"\n")

    def _become(self, spells: list[Spell]) -> None:
        self._spells = deque(spells)
        self._turn(time.monotonic())

    def _turn(self, now: float) -> None:
        """The next spell begins."""
        spell = self._spells[0]
        self._spells.rotate(-1)
        self._turns = now + spell.seconds if spell.seconds else float("inf")
        for direction in (self._up, self._down):
            direction.become(spell, now)


def main() -> None:
    board, cloud, seed = map(int, sys.argv[1:])
    for descriptor in (board, cloud):
        os.set_blocking(descriptor, False)
    # Others on this machine work hard; this process hardly, but on time.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    Relay(board, cloud, seed).run()


if __name__ == "__main__":
    main()
