"""Modelled verifiers: what a forward costs by its width, and how long a round waits for its turn.

Forwards are DESIGN's measured rows (one H200, bf16, context 512, CUDA graphs); `loaded` has the 32B row's shape at the
80 ms of a loaded or cheap GPU. Waiting is modelled: on an idle verifier the batching window, on a busy one the forward
that is under way. A verifier may speculate by itself: it drafts SPECULATED tokens beside the target for each of its own
forwards, with the very same frozen draft, at the cost that DESIGN's table of co-located speculation implies.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

import msgspec

from edge_runtime.protocol.errors import InputError

# What the verifier takes by default: nodes of a forward, and drafted tokens of a round.
WIDEST = 72
LONGEST_DRAFT = 32
SPECULATED = 5


class VerifierCost(msgspec.Struct, frozen=True):
    """Figures of a verifier; times in seconds.

    Attributes:
        name: for people; `+spec` at its end if it speculates.
        forwards: (nodes, seconds) of a forward, by growing width; between and beyond them on straight lines.
        queue_seconds: mean wait of a round; uniform from 0 to twice this.
        draft_seconds: for each token that it drafts beside the target.
        speculates: whether it does.
    """

    name: str
    forwards: tuple[tuple[int, float], ...]
    queue_seconds: float
    draft_seconds: float
    speculates: bool = False


class SimulatedVerifier:
    """A verifier on a simulated clock.

    Attributes:
        cost: its figures.
        forward: seconds of a forward by its number of nodes, 0 to WIDEST.
        own_forward: seconds of a forward for tokens of its own, and of drafting them.
        speculated: tokens that it drafts for each of these.
    """

    def __init__(self, cost: VerifierCost, seed: int) -> None:
        self.cost = cost
        self.forward = [_interpolated(cost.forwards, width) for width in range(WIDEST + 1)]
        self.speculated = SPECULATED if cost.speculates else 0
        self.own_forward = self.forward[1 + self.speculated] + self.speculated * cost.draft_seconds
        self._random = Random(seed).random

    def wait(self) -> float:
        """Seconds until a round that has just come gets its forward."""
        return 2 * self.cost.queue_seconds * self._random()


def _interpolated(points: tuple[tuple[int, float], ...], width: int) -> float:
    lines = list(pairwise(points))
    (left, low), (right, high) = next((line for line in lines if width <= line[1][0]), lines[-1])
    return low + (high - low) * (width - left) / (right - left)


def _rows(one: float, five: float, seventeen: float) -> tuple[tuple[int, float], ...]:
    return (1, one / 1e3), (5, five / 1e3), (17, seventeen / 1e3)


_PLAIN = (
    VerifierCost("7b", _rows(6.8, 7.9, 8.5), 0.0005, 0.0008),
    VerifierCost("7b-16", _rows(8.9, 11.2, 15.4), 0.0045, 0.0008),
    VerifierCost("7b-64", _rows(12.4, 26.0, 44.9), 0.0062, 0.0008),
    VerifierCost("32b", _rows(23.2, 25.5, 26.8), 0.0005, 0.0012),
    VerifierCost("loaded", _rows(72.8, 80.0, 84.1), 0.010, 0.0032),
)
VERIFIERS = {
    cost.name: cost
    for plain in _PLAIN
    for cost in (plain, msgspec.structs.replace(plain, name=f"{plain.name}+spec", speculates=True))
}


def verifier(name: str, seed: int) -> SimulatedVerifier:
    """The shipped verifier of that name. Raises InputError."""
    if name not in VERIFIERS:
        raise InputError(f"no verifier preset {name!r}; there are {', '.join(VERIFIERS)}")
    return SimulatedVerifier(VERIFIERS[name], seed)
