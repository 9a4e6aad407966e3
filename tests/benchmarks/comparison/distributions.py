"""Speculative sampling with probabilities on the wire: their encoding, and the rule of acceptance.

Leviathan, Kalman, Matias (arXiv 2211.17192), algorithm 1: a draft token x is accepted with probability
min(1, p(x) / q(x)); the first rejected one is replaced by a token drawn from max(0, p - q), normalized; after a draft
that is accepted as a whole, one more token is drawn from p.

Two formats exist. Traditional: the board sends q of every draft token, and the cloud draws all tokens. DSSD
(arXiv 2507.12000): the board sends q(x) alone, and the cloud answers a rejection with p, from which the board draws.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.varints import pack_varints, unpack_varints

Probabilities = npt.NDArray[np.float32]

# First byte of an encoded distribution: probabilities of all ids; of those in a bit mask; of those in a list.
DENSE, MASKED, LISTED = range(3)


class ProbabilityOpening(msgspec.Struct, array_like=True):
    """A text that begins."""

    prompt: list[int]
    temperature: float
    seed: int


class ProbabilityRound(msgspec.Struct, array_like=True):
    """The board's request.

    Attributes:
        session: id; 0 opens a session.
        round: number of the round; a repeated request gets the recorded answer.
        tokens: draft tokens after the text that both ends know.
        draft_probabilities: traditional: the encoded q of every draft token. DSSD: q(x) of all, float16.
        opening: of a session that is opened.
    """

    session: int
    round: int
    tokens: list[int]
    draft_probabilities: list[bytes]
    traditional: bool = True
    opening: ProbabilityOpening | None = None


class ProbabilityReply(msgspec.Struct, array_like=True):
    """The cloud's answer.

    Attributes:
        accepted: accepted length.
        token: the token after it; -1 if the board draws it from `distribution`.
        forward_100us: time of the forward, in units of 100 microseconds.
    """

    session: int
    accepted: int
    token: int
    forward_100us: int
    distribution: bytes = b""


class Judgement(NamedTuple):
    """Accepted length, and the distribution from which the token after it is drawn, unless it is the residual's."""

    accepted: int
    rejected: bool


def warp(logits: npt.NDArray[np.float32], temperature: float) -> Probabilities:
    """Return the distribution that tokens are drawn from: (V,) logits to (V,) probabilities; one-hot at temperature 0.

    Rounded to float16, as it travels, so that board and cloud use the same numbers.
    """
    if not temperature:
        probabilities = np.zeros(len(logits), np.float32)
        probabilities[int(np.argmax(logits))] = 1.0
        return probabilities
    scores = np.exp((logits - logits.max()) / np.float32(temperature))
    rounded: Probabilities = (scores / scores.sum()).astype(np.float16).astype(np.float32)
    return rounded


def encode_distribution(probabilities: Probabilities) -> bytes:
    """Encode probabilities as float16, in the shortest of three formats; those that round to 0 do not travel."""
    values = probabilities.astype("<f2")
    (ids,) = np.nonzero(values)
    kept = values[ids].tobytes()
    dense = bytes([DENSE]) + values.tobytes()
    masked = bytes([MASKED]) + np.packbits(values > 0).tobytes() + kept
    listed = dense
    # Gaps take one byte or more each.
    if len(ids) < len(values) // 8:
        gaps = pack_varints(np.diff(ids, prepend=-1).tolist())
        listed = bytes([LISTED]) + pack_varints([len(gaps)]) + gaps + kept
    return min(dense, masked, listed, key=len)


def decode_distribution(encoded: bytes, size: int) -> Probabilities:
    """Inverse of `encode_distribution`: (size,) probabilities."""
    kind, body = encoded[0], encoded[1:]
    if kind == DENSE:
        return np.frombuffer(body, "<f2").astype(np.float32)
    if kind == MASKED:
        mask_bytes = -(-size // 8)
        ids = np.flatnonzero(np.unpackbits(np.frombuffer(body[:mask_bytes], np.uint8), count=size))
        kept = body[mask_bytes:]
    else:
        start = next(index for index, byte in enumerate(body) if byte < 0x80) + 1
        (length,) = unpack_varints(body[:start])
        ids = np.cumsum(unpack_varints(body[start : start + length])) - 1
        kept = body[start + length :]
    probabilities = np.zeros(size, np.float32)
    probabilities[ids] = np.frombuffer(kept, "<f2")
    return probabilities


def judge(
    tokens: list[int], draft: npt.NDArray[np.float32], target: list[Probabilities], random: np.random.Generator
) -> Judgement:
    """Accept a prefix of the draft.

    Args:
        draft: (K,) q(x) of every draft token.
        target: p at each of the K positions, and after them.
    """
    for index, token in enumerate(tokens):
        if random.random() * draft[index] >= target[index][token]:
            return Judgement(index, True)
    return Judgement(len(tokens), False)


def draw(probabilities: Probabilities, random: np.random.Generator) -> int:
    """Draw a token; the probabilities need not add up to 1."""
    cumulated = np.cumsum(probabilities, dtype=np.float64)
    return int(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"))


def residual(target: Probabilities, draft: Probabilities) -> Probabilities:
    """Return what the token after a rejection is drawn from; p itself where rounding leaves nothing of p - q."""
    difference = np.maximum(target - draft, 0)
    return difference if difference.any() else target
