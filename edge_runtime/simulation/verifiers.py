"""Modeled verifiers: forward time by width, and queueing time.

Forward times are measured (one H200, bf16, context 512, CUDA graphs; `tests.benchmarks.verifier`); `loaded` has the
shape of the 32B row at the 80 ms of a loaded or cheap GPU. Queueing is modeled: the batching window on an idle
verifier, the forward under way on a busy one. A verifier may speculate on the server too: it then drafts
SERVER_DRAFT_TOKENS tokens for each forward that continues the text, with the same frozen draft model, at a cost that
follows from measurements of co-located speculation.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

import msgspec

from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.messages import MAX_TREE_NODES

# Draft tokens per forward of a verifier that speculates on the server. The real one chooses their number, at most so
# many by default, by what it measures.
SERVER_DRAFT_TOKENS = 5


class VerifierCost(msgspec.Struct, frozen=True):
    """Cost figures of a verifier; times in seconds.

    Attributes:
        name: display name; ends in `+spec` if it speculates.
        forwards: (nodes, seconds) of a forward, by ascending width; linear between and beyond them.
        queue_seconds: mean wait of a round; uniform from 0 to twice this.
        draft_seconds: drafting one token on the server.
        speculates: whether it drafts on the server.
    """

    name: str
    forwards: tuple[tuple[int, float], ...]
    queue_seconds: float
    draft_seconds: float
    speculates: bool = False


class SimulatedVerifier:
    """A verifier on a simulated clock.

    Attributes:
        forward_seconds: time of a forward by its number of nodes, 0 to MAX_TREE_NODES.
        draft_tokens: tokens that it drafts for each forward that continues the text; 0 if it does not speculate.
        continuation_seconds: time of such a forward, drafting included.
    """

    def __init__(self, cost: VerifierCost, seed: int) -> None:
        self.cost = cost
        self.forward_seconds = [_interpolate(cost.forwards, width) for width in range(MAX_TREE_NODES + 1)]
        self.draft_tokens = SERVER_DRAFT_TOKENS if cost.speculates else 0
        self.continuation_seconds = self.forward_seconds[1 + self.draft_tokens] + self.draft_tokens * cost.draft_seconds
        self._random = Random(seed).random

    def sample_queue_seconds(self) -> float:
        """Draw the wait of a round that has just arrived."""
        return 2 * self.cost.queue_seconds * self._random()


def _interpolate(points: tuple[tuple[int, float], ...], width: int) -> float:
    lines = list(pairwise(points))
    (left, low), (right, high) = next((line for line in lines if width <= line[1][0]), lines[-1])
    return low + (high - low) * (width - left) / (right - left)


def _rows(one: float, five: float, seventeen: float) -> tuple[tuple[int, float], ...]:
    """The forwards of 1, 5 and 17 nodes, given in milliseconds."""
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


def make_verifier(name: str, seed: int) -> SimulatedVerifier:
    """Return the preset verifier of that name. Raises InputError."""
    if name not in VERIFIERS:
        raise InputError(f"no verifier preset {name!r}; there are {', '.join(VERIFIERS)}")
    return SimulatedVerifier(VERIFIERS[name], seed)
