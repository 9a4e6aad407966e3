"""The choice of a token in torch: the definitions of `edge_runtime.contract.coupling`, for rows of logits at once.

On a CPU the numpy form is faster, because it computes only the few logarithms that can matter and only for the rows
that the walk reaches; on an accelerator all rows are chosen on the device and only ids and margins cross the bus.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from edge_runtime.contract.coupling import GOLDEN, MULTIPLIER_1, MULTIPLIER_2, Chooser, Sampling, position_key


class Choice(NamedTuple):
    """A chosen token and how far its coupled score is above the second best (at temperature 0: its logit)."""

    token: int
    margin: float


class Choices:
    """The target's choice for any row of one forward's logits.

    Args:
        logits: (rows, V) float32 on the target's device.
        positions: absolute position of the token that each row predicts.
        sampling: warping and seed.
        chooser: the numpy form, used on a CPU.
    """

    def __init__(self, logits: torch.Tensor, positions: list[int], sampling: Sampling, chooser: Chooser) -> None:
        self._positions = positions
        self._sampling = sampling
        self._chooser = chooser
        if logits.device.type == "cpu":
            self._rows = logits.numpy()
            self._chosen: list[Choice] | None = None
        else:
            self._chosen = choose(logits, positions, sampling)

    def __getitem__(self, row: int) -> Choice:
        if self._chosen is not None:
            return self._chosen[row]
        best = self._chooser.rank(self._rows[row], self._sampling, self._positions[row], count=2)
        second = best.scores[1] if len(best.scores) > 1 else -torch.inf
        return Choice(best.ids[0], best.scores[0] - second)


def choose(logits: torch.Tensor, positions: list[int], sampling: Sampling) -> list[Choice]:
    """The target's choice for every row of `logits` (rows, V) float32, V >= 2, on its device."""
    scores = coupled_scores(logits, positions, sampling)
    best = torch.topk(scores, 2, dim=-1).values
    # topk does not say which of two equal scores it takes; the rule takes the lower id.
    ids = torch.arange(logits.shape[-1], device=logits.device)
    tokens = torch.where(scores == best[:, :1], ids, logits.shape[-1]).amin(-1)
    return [
        Choice(token, margin) for token, margin in zip(tokens.tolist(), (best[:, 0] - best[:, 1]).tolist(), strict=True)
    ]


def coupled_scores(logits: torch.Tensor, positions: list[int], sampling: Sampling) -> torch.Tensor:
    """logits / T + noise over the candidates, -inf elsewhere. (rows, V) float32 -> (rows, V) float64."""
    scores = logits.double()
    if sampling.temperature == 0.0:
        return scores
    scores = scores / sampling.temperature
    excluded = excluded_mask(logits, scores, sampling)
    u = uniforms(sampling.seed, positions, torch.arange(logits.shape[-1], device=logits.device))
    return (scores - torch.log(-torch.log(u))).masked_fill(excluded, -torch.inf)


def excluded_mask(logits: torch.Tensor, scaled: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What top-k and top-p remove; `scaled` (rows, V) float64 is logits / T. Returns (rows, V) bool."""
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        excluded |= logits < torch.topk(logits, sampling.top_k).values[..., -1:]
    if sampling.top_p < 1.0:
        left = scaled.masked_fill(excluded, -torch.inf)
        ordered, order = torch.sort(left, dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        dropped = mass.cumsum(-1) - mass >= sampling.top_p - 1e-12
        dropped[..., 0] = False
        excluded |= torch.zeros_like(excluded).scatter(-1, order, dropped)
    return excluded


def uniforms(seed: int, positions: list[int], ids: torch.Tensor) -> torch.Tensor:
    """u(seed, position, id), bit-equal to `coupling.uniforms`. ids (m,) int64 -> (len(positions), m) float64."""
    keys = torch.tensor([_signed(position_key(seed, p)) for p in positions], device=ids.device)
    z = keys[:, None] + (ids + 1)[None, :] * _signed(GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(MULTIPLIER_1)
    z = (z ^ _shift(z, 27)) * _signed(MULTIPLIER_2)
    z = z ^ _shift(z, 31)
    return (_shift(z, 12).double() + 0.5) * 2.0**-52


def _signed(value: int) -> int:
    """The int64 with the same bits: torch multiplies int64 modulo 2^64 but has no full uint64."""
    return value - (1 << 64) if value >> 63 else value


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
