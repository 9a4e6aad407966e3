"""Token sampling in torch: the definitions of `edge_runtime.protocol.sampling` for many rows of logits at once.

On a CPU the numpy form (`LazySampledTokens`) is faster: it computes only the few logarithms that can decide, and only
for the rows that verification reaches. On an accelerator (`sample_tokens`) all rows are sampled on the device, and only
token ids and margins are copied to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch

from edge_runtime.protocol.sampling import (
    GOLDEN_GAMMA,
    MIX_MULTIPLIER_1,
    MIX_MULTIPLIER_2,
    CoupledSampler,
    Sampling,
    position_key,
)

# Logits whose float64 scores are computed at once. Chosen to bound temporary memory to some 256 MB per intermediate.
MAX_SCORES_AT_ONCE = 1 << 25


class SampledToken(NamedTuple):
    """A sampled token and its margin: its coupled score minus the second best one (at temperature 0: of the logits)."""

    token: int
    margin: float


class SampledTokens(Protocol):
    """The tokens that a model samples after the rows of a segment, by row."""

    def __getitem__(self, row: int, /) -> SampledToken: ...


class LazySampledTokens:
    """Samples the token after a row of a segment when it is asked for; on a CPU.

    Args:
        logits: (rows, V) float32.
        positions: absolute position of the token that each row predicts.
        sampling: sampling parameters and seed.
        sampler: the numpy form.
    """

    def __init__(self, logits: torch.Tensor, positions: list[int], sampling: Sampling, sampler: CoupledSampler) -> None:
        self.logits = logits
        self._rows = logits.numpy()
        self._positions = positions
        self._sampling = sampling
        self._sampler = sampler

    def __getitem__(self, row: int) -> SampledToken:
        best = self._sampler.rank(self._rows[row], self._sampling, self._positions[row], count=2)
        second = best.scores[1] if len(best.scores) > 1 else -torch.inf
        return SampledToken(best.ids[0], best.scores[0] - second)


class SamplingBatch(NamedTuple):
    """Sampling parameters of the rows of one forward; tensors are on the forward's device.

    Attributes:
        seeds: (rows,) int64 with the bits of the unsigned seeds.
        positions: (rows,) int64, absolute positions of the tokens to sample.
        temperatures: (rows,) float64.
        truncated: ranges of rows to which top-k or top-p applies, with their parameters.
        greedy: all rows have temperature 0.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    temperatures: torch.Tensor
    truncated: list[tuple[slice, Sampling]]
    greedy: bool

    @classmethod
    def from_segments(
        cls, segments: Iterable[tuple[Sampling, list[int]]], device: torch.device, rows: int = 0
    ) -> SamplingBatch:
        """The parameters of consecutive segments.

        Args:
            segments: sampling parameters of each segment, and the positions of the tokens to sample.
            rows: pad to this many rows with greedy ones.
        """
        seeds: list[int] = []
        positions: list[int] = []
        temperatures: list[float] = []
        truncated: list[tuple[slice, Sampling]] = []
        for sampling, segment_positions in segments:
            count = len(segment_positions)
            if sampling.temperature and (sampling.top_k or sampling.top_p < 1.0):
                truncated.append((slice(len(seeds), len(seeds) + count), sampling))
            seeds += [as_int64(sampling.seed)] * count
            temperatures += [sampling.temperature] * count
            positions += segment_positions
        greedy = not any(temperatures)
        padding = [0] * max(0, rows - len(seeds))
        integers = torch.tensor([seeds + padding, positions + padding])
        floats = torch.tensor(temperatures + padding, dtype=torch.float64)
        if device.type == "cuda":
            integers = integers.pin_memory().to(device, non_blocking=True)
            floats = floats.pin_memory().to(device, non_blocking=True)
        return cls(integers[0], integers[1], floats, truncated, greedy)

    def slice_rows(self, start: int, stop: int) -> SamplingBatch:
        """The parameters of rows `start` to `stop`."""
        truncated = [
            (slice(max(rows.start, start) - start, min(rows.stop, stop) - start), sampling)
            for rows, sampling in self.truncated
            if rows.start < stop and start < rows.stop
        ]
        rows = slice(start, stop)
        return SamplingBatch(self.seeds[rows], self.positions[rows], self.temperatures[rows], truncated, self.greedy)


def sample_tokens(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Sample the token after each row, on the device.

    Args:
        logits: (rows, V), V >= 2.

    Returns (2, rows) float64: the token ids, and their margins (see `SampledToken`).
    """
    chunk_rows = max(1, MAX_SCORES_AT_ONCE // logits.shape[1])
    chunks = []
    for start in range(0, len(logits), chunk_rows):
        scores = coupled_scores(logits[start : start + chunk_rows], batch.slice_rows(start, start + chunk_rows))
        # Of equal scores argmax takes the first, as the sampling rule requires.
        tokens = scores.argmax(-1, keepdim=True)
        best = scores.gather(-1, tokens)
        second = scores.scatter_(-1, tokens, -torch.inf).amax(-1, keepdim=True)
        chunks.append(torch.cat([tokens.double(), best.double() - second.double()], dim=1).T)
    return torch.cat(chunks, dim=1)


def coupled_scores(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Coupled scores logits / T + noise of the candidates, -inf for all other tokens.

    (rows, V) -> (rows, V), float64, or float32 if all rows are greedy.
    """
    logits = logits.float()
    if batch.greedy:
        return logits.clone()
    temperatures = batch.temperatures[:, None]
    sampled = temperatures > 0
    scaled = logits.double() / torch.where(sampled, temperatures, 1.0)
    u = _uniforms(position_keys(batch.seeds, batch.positions), torch.arange(logits.shape[1], device=logits.device))
    scores = torch.where(sampled, scaled - torch.log(-torch.log(u)), scaled)
    for rows, sampling in batch.truncated:
        scores[rows].masked_fill_(excluded_mask(logits[rows], scaled[rows], sampling), -torch.inf)
    return scores


def excluded_mask(logits: torch.Tensor, scaled: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The tokens that top-k and top-p exclude: (rows, V) bool.

    Args:
        logits: (rows, V) float32.
        scaled: (rows, V) float64, logits / T.
    """
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        excluded |= logits < torch.topk(logits, sampling.top_k).values[..., -1:]
    if sampling.top_p < 1.0:
        remaining = scaled.masked_fill(excluded, -torch.inf)
        ordered, order = torch.sort(remaining, dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        dropped = mass.cumsum(-1) - mass >= sampling.top_p - 1e-12
        dropped[..., 0] = False
        excluded |= torch.zeros_like(excluded).scatter(-1, order, dropped)
    return excluded


def uniform_noise(seed: int, positions: list[int], ids: torch.Tensor) -> torch.Tensor:
    """u(seed, position, id), bit-equal to `protocol.sampling.uniform_noise`. (m,) int64 ids -> (positions, m)."""
    return _uniforms(torch.tensor([as_int64(position_key(seed, p)) for p in positions], device=ids.device), ids)


def position_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """key(seed, position), bit-equal to `protocol.sampling.position_key`. Both (n,) int64 -> (n,) int64."""
    return _mix(_mix(seeds + as_int64(GOLDEN_GAMMA)) + (positions + 1) * as_int64(GOLDEN_GAMMA))


def as_int64(value: int) -> int:
    """The int64 with the same bits as a uint64: torch multiplies int64 modulo 2^64 but has no full uint64."""
    return value - (1 << 64) if value >> 63 else value


def _uniforms(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    z = _mix(keys[:, None] + (ids + 1)[None, :] * as_int64(GOLDEN_GAMMA))
    return (_shift_right(z, 12).double() + 0.5) * 2.0**-52


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * as_int64(MIX_MULTIPLIER_1)
    z = (z ^ _shift_right(z, 27)) * as_int64(MIX_MULTIPLIER_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64; torch's own shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
