"""What surrounds a simulated board: link, verifier, and the connection between them on one clock."""

from __future__ import annotations

from pathlib import Path
from random import Random

from edge_runtime.planning.board_profile import find_profile
from edge_runtime.planning.device_model import Device
from edge_runtime.simulation.links import Link, parse_link
from edge_runtime.simulation.verifiers import SimulatedVerifier, verifier

# As `edge_runtime.verifier.client` does: pauses between attempts double up to this.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
# The kernel's weight of a new sample of the round-trip time (RFC 6298).
SRTT_SHARE = 1 / 8

# Payload in one direction of a round without its ids, with HTTP/2's framing; an id in msgpack; a frame of a stream,
# of which the verifier sends at most one in FRAME_SECONDS.
ROUND_BYTES = 75
ID_BYTES = 1.3
FRAME_BYTES = 15
FRAME_SECONDS = 0.05

SMALL_DRAFT = 40_000_000
ANCHOR_DRAFT = 270_000_000


class World:
    """A board, a link and a verifier; every random choice comes from the seed.

    Attributes:
        name: for people.
        device: what the board really does and draws.
        link, verifier: the rest.
        rtt_seconds: smoothed round-trip time of the connection, as the kernel would tell it.
    """

    def __init__(self, name: str, device: Device, link: Link, verifier: SimulatedVerifier, seed: int = 0) -> None:
        self.name = name
        self.device = device
        self.link = link
        self.verifier = verifier
        self._random = Random(seed).random
        self._sample = 0.0
        self._clean = True
        opened = link.available(0.0)
        # The handshake gives the kernel its first sample.
        self.rtt_seconds = link.up(opened, 0).seconds + link.down(opened, 0).seconds

    def up(self, now: float, count: int) -> tuple[float, bool]:
        """When `count` bytes sent at `now` arrive, and whether the request had to be repeated."""
        there = self._retried(now)
        seconds, lost = self.link.up(there, count)
        self._sample, self._clean = seconds, not lost
        return there + seconds, there > now

    def down(self, now: float, count: int) -> tuple[float, bool]:
        """When `count` bytes that the verifier sends at `now` are here; what an outage loses is asked for again."""
        there = self._retried(now)
        if there > now:
            # The recorded answer comes to a repeated request.
            arrived, _ = self.up(there, count)
            there = self._retried(arrived)
            return there + self.link.down(there, count).seconds, True
        seconds, lost = self.link.down(now, count)
        # Retransmitted packets tell nothing of the round-trip time (Karn).
        if self._clean and not lost:
            self.rtt_seconds += SRTT_SHARE * (self._sample + seconds - self.rtt_seconds)
        return now + seconds, False

    def _retried(self, now: float) -> float:
        """The first attempt, of one at `now` and others after growing pauses, at which the link is there."""
        back = self.link.available(now)
        pause = FIRST_PAUSE
        while now < back:
            now += pause * (0.5 + self._random() / 2)
            pause = min(2 * pause, LONGEST_PAUSE)
            if now >= back:
                back = self.link.available(now)
        return now


def make_world(
    link: str,
    profile: str | Path,
    verifier_name: str,
    *,
    weight_bytes: int = SMALL_DRAFT,
    slower: float = 1.0,
    seed: int = 0,
) -> World:
    """A world by the names of its parts.

    Args:
        link: see `links.parse_link`.
        profile: a shipped profile's name, or a profile's file.
        verifier_name: see `verifiers.VERIFIERS`.
        weight_bytes: of the draft.
        slower: the board takes this many times as long as its profile says.
        seed: of all that is random.

    Raises:
        InputError: there is no such part.
    """
    way = parse_link(link, seed)
    board = find_profile(str(profile))
    device = Device.of(board, int(weight_bytes * slower), radio=way.radio)
    name = f"{link}, {board.name} with {weight_bytes / 1e6:.0f} MB, {verifier_name}"
    return World(name, device, way, verifier(verifier_name, seed + 1), seed + 2)
