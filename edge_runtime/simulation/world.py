"""The surroundings of a simulated board: a link, a verifier, and the connection between them on one clock."""

from __future__ import annotations

from pathlib import Path
from random import Random

from edge_runtime.planning.board_profile import find_profile
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.simulation.links import Link, parse_link
from edge_runtime.simulation.verifiers import SimulatedVerifier, make_verifier

# Pauses between attempts to reach the verifier double from the first to the longest, like those of
# `edge_runtime.verifier.client`. Chosen.
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
# The kernel's weight of a new sample of the round-trip time (RFC 6298).
SRTT_SHARE = 1 / 8

# TCP payload with HTTP/2 framing: a round in one direction without its ids; one id in msgpack; one frame of a stream.
ROUND_BYTES = 75
ID_BYTES = 1.3
FRAME_BYTES = 15

# Weights of a small standalone draft, and of an anchor draft whose head comes from a larger target.
SMALL_DRAFT_BYTES = 40_000_000
ANCHOR_DRAFT_BYTES = 270_000_000


class World:
    """A board, a link and a verifier; every random choice comes from the seed.

    Attributes:
        name: display name.
        device: true speed and power of the board.
        rtt_seconds: smoothed round-trip time of the connection, as the kernel would report it.
    """

    def __init__(self, name: str, device: DeviceModel, link: Link, verifier: SimulatedVerifier, seed: int = 0) -> None:
        self.name = name
        self.device = device
        self.link = link
        self.verifier = verifier
        self._random = Random(seed).random
        # One-way time of the last request, and whether none of its packets was lost.
        self._up_seconds = 0.0
        self._clean = True
        opened = link.available(0.0)
        # The handshake gives the kernel its first sample.
        self.rtt_seconds = link.up(opened, 0).seconds + link.down(opened, 0).seconds

    def up(self, now: float, count: int) -> tuple[float, bool]:
        """Send `count` bytes at `now`; return when they arrive, and whether the request had to be repeated."""
        sent = self._first_attempt(now)
        seconds, lost = self.link.up(sent, count)
        self._up_seconds, self._clean = seconds, not lost
        return sent + seconds, sent > now

    def down(self, now: float, count: int) -> tuple[float, bool]:
        """Return when `count` bytes that the verifier sends at `now` arrive, and whether they were requested again.

        If an outage loses them, the board repeats its request and receives the recorded reply.
        """
        sent = self._first_attempt(now)
        if sent > now:
            arrived, _ = self.up(sent, count)
            sent = self._first_attempt(arrived)
            return sent + self.link.down(sent, count).seconds, True
        seconds, lost = self.link.down(now, count)
        # Retransmitted packets give no sample of the round-trip time (Karn's algorithm).
        if self._clean and not lost:
            self.rtt_seconds += SRTT_SHARE * (self._up_seconds + seconds - self.rtt_seconds)
        return now + seconds, False

    def _first_attempt(self, now: float) -> float:
        """Time of the first attempt, at `now` or after growing pauses, at which the link is available."""
        available = self.link.available(now)
        pause = FIRST_PAUSE_SECONDS
        while now < available:
            now += pause * (0.5 + self._random() / 2)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            if now >= available:
                available = self.link.available(now)
        return now


def make_world(
    link: str,
    profile: str | Path,
    verifier_name: str,
    *,
    weight_bytes: int = SMALL_DRAFT_BYTES,
    slower: float = 1.0,
    seed: int = 0,
) -> World:
    """Build a world from the names of its parts.

    Args:
        link: see `links.parse_link`.
        profile: name of a shipped device profile, or path of a profile.
        verifier_name: see `verifiers.VERIFIERS`.
        weight_bytes: size of the draft's weights.
        slower: factor by which the board drafts slower than its profile.
        seed: seed of everything random.

    Raises:
        InputError: there is no such part.
    """
    parsed_link = parse_link(link, seed)
    board = find_profile(str(profile))
    device = DeviceModel.from_profile(board, int(weight_bytes * slower), radio=parsed_link.radio)
    name = f"{link}, {board.name} with a draft of {weight_bytes / 1e6:.0f} MB, {verifier_name}"
    return World(name, device, parsed_link, make_verifier(verifier_name, seed + 1), seed + 2)
