"""The choice of a token in torch: the definitions of `edge_runtime.protocol.sampling`, for rows of logits at once.

On a CPU the numpy form is faster, because it computes only the few logarithms that can matter and only for the rows
that the walk reaches; on an accelerator all rows are chosen on the device and only ids and margins cross the bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from edge_runtime.protocol.sampling import GOLDEN, MULTIPLIER_1, MULTIPLIER_2, Chooser, Sampling, position_key


class Choice(NamedTuple):
    """A chosen token and how far its coupled score is above the second best (at temperature 0: its logit)."""

    token: int
    margin: float


class Choices:
    """The target's choice behind any row of a piece, on a CPU.

    Args:
        logits: (rows, V) float32.
        positions: absolute position of the token that each row predicts.
        sampling: warping and seed.
        chooser: the numpy form.
    """

    def __init__(self, logits: torch.Tensor, positions: list[int], sampling: Sampling, chooser: Chooser) -> None:
        self.logits = logits
        self._rows = logits.numpy()
        self._positions = positions
        self._sampling = sampling
        self._chooser = chooser

    def __getitem__(self, row: int) -> Choice:
        best = self._chooser.rank(self._rows[row], self._sampling, self._positions[row], count=2)
        second = best.scores[1] if len(best.scores) > 1 else -torch.inf
        return Choice(best.ids[0], best.scores[0] - second)


class Warping(NamedTuple):
    """How the token behind each row of a forward is chosen; tensors are on the forward's device.

    Attributes:
        seeds: (rows,) int64 with the bits of the seeds.
        positions: (rows,) int64, of the tokens to choose.
        temperatures: (rows,) float64.
        cut: rows that top-k or top-p applies to, and how.
        greedy: no row has a temperature.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    temperatures: torch.Tensor
    cut: list[tuple[slice, Sampling]]
    greedy: bool

    @classmethod
    def of(cls, pieces: Iterable[tuple[Sampling, list[int]]], device: torch.device, rows: int = 0) -> Warping:
        """For pieces one behind the other, each with its tokens' positions; filled up to `rows` with greedy ones."""
        seeds: list[int] = []
        positions: list[int] = []
        temperatures: list[float] = []
        cut: list[tuple[slice, Sampling]] = []
        for sampling, places in pieces:
            if sampling.temperature and (sampling.top_k or sampling.top_p < 1.0):
                cut.append((slice(len(seeds), len(seeds) + len(places)), sampling))
            seeds += [signed(sampling.seed)] * len(places)
            temperatures += [sampling.temperature] * len(places)
            positions += places
        greedy = not any(temperatures)
        filling = [0] * max(0, rows - len(seeds))
        whole = torch.tensor([seeds + filling, positions + filling])
        warm = torch.tensor(temperatures + filling, dtype=torch.float64)
        if device.type == "cuda":
            whole, warm = (
                whole.pin_memory().to(device, non_blocking=True),
                warm.pin_memory().to(device, non_blocking=True),
            )
        return cls(whole[0], whole[1], warm, cut, greedy)

    def part(self, start: int, stop: int) -> Warping:
        """Those of the rows `start` to `stop`."""
        cut = [
            (slice(max(rows.start, start) - start, min(rows.stop, stop) - start), sampling)
            for rows, sampling in self.cut
            if rows.start < stop and start < rows.stop
        ]
        rows = slice(start, stop)
        return Warping(self.seeds[rows], self.positions[rows], self.temperatures[rows], cut, self.greedy)


# Of so many logits scores are made at a time, which bounds the memory that they take.
AT_ONCE = 1 << 25


def choose(logits: torch.Tensor, warping: Warping) -> torch.Tensor:
    """(rows, V) -> (2, rows) float64 on the device: the token chosen behind each row, and its margin. V >= 2."""
    many = max(1, AT_ONCE // logits.shape[1])
    chosen = []
    for start in range(0, len(logits), many):
        scores = coupled_scores(logits[start : start + many], warping.part(start, start + many))
        # Of equal scores argmax takes the first, as the rule does.
        tokens = scores.argmax(-1, keepdim=True)
        best = scores.gather(-1, tokens)
        second = scores.scatter_(-1, tokens, -torch.inf).amax(-1, keepdim=True)
        chosen.append(torch.cat([tokens.double(), best.double() - second.double()], dim=1).T)
    return torch.cat(chosen, dim=1)


def coupled_scores(logits: torch.Tensor, warping: Warping) -> torch.Tensor:
    """logits / T + noise over the candidates, -inf elsewhere. (rows, V) -> the same in float64, greedy in float32."""
    logits = logits.float()
    if warping.greedy:
        return logits.clone()
    temperatures = warping.temperatures[:, None]
    warm = temperatures > 0
    scores = logits.double() / torch.where(warm, temperatures, 1.0)
    u = _uniforms(position_keys(warping.seeds, warping.positions), torch.arange(logits.shape[1], device=logits.device))
    noisy = torch.where(warm, scores - torch.log(-torch.log(u)), scores)
    for rows, sampling in warping.cut:
        noisy[rows].masked_fill_(excluded_mask(logits[rows], scores[rows], sampling), -torch.inf)
    return noisy


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
    return _uniforms(torch.tensor([signed(position_key(seed, p)) for p in positions], device=ids.device), ids)


def position_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """key(seed, position), bit-equal to `coupling.position_key`. Both (n,) int64."""
    return _mix(_mix(seeds + signed(GOLDEN)) + (positions + 1) * signed(GOLDEN))


def signed(value: int) -> int:
    """The int64 with the same bits: torch multiplies int64 modulo 2^64 but has no full uint64."""
    return value - (1 << 64) if value >> 63 else value


def _uniforms(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    z = _mix(keys[:, None] + (ids + 1)[None, :] * signed(GOLDEN))
    return (_shift(z, 12).double() + 0.5) * 2.0**-52


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * signed(MULTIPLIER_1)
    z = (z ^ _shift(z, 27)) * signed(MULTIPLIER_2)
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
