"""Token sampling in torch: the definitions of `edge_runtime.protocol.sampling` for many rows of logits at once.

On a CPU the numpy form (`LazySampledTokens`) is faster: it computes only the few logarithms that can decide, and only
for the rows that verification reaches. On an accelerator (`sample_tokens`) all rows are sampled on the device, and only
token ids and margins are copied to the host.

How logits are processed before (`edge_runtime.protocol.logits_processing`) depends on the text before a row, which is
known without the logits: the changes of every row are computed on the host while the forward runs, and applied on the
device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.logits_processing import LogitChanges, SequenceProcessor
from edge_runtime.protocol.messages import LOGPROB_UNITS, MIN_LOGPROB, TokenLogprobs
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
GREEDY = Sampling()


class SampledToken(NamedTuple):
    """A sampled token.

    Attributes:
        margin: its coupled score minus the second best one (at temperature 0: of the processed logits).
        logprobs: log-probabilities of the row, if they were asked for.
    """

    token: int
    margin: float
    logprobs: TokenLogprobs | None = None


class SampledTokens(Protocol):
    """The tokens that a model samples after the rows of a segment, by row."""

    def __getitem__(self, row: int, /) -> SampledToken: ...


class RowSampling:
    """How the tokens after the rows of one segment are sampled."""

    def __init__(
        self,
        parameters: Sampling,
        positions: list[int],
        *,
        processor: SequenceProcessor | None = None,
        paths: Sequence[list[int] | None] = (),
        logprobs: int = 0,
    ) -> None:
        """
        Args:
            parameters: sampling parameters and seed.
            positions: absolute position of the token that each row predicts.
            processor: of the text; its text now is the base of `paths`. None if logits are not processed.
            paths: the tokens between that text and each row's prediction; None for a row that will not be asked for.
            logprobs: 0, or k for log-probabilities with the k - 1 most probable tokens.
        """
        self.parameters = parameters
        self.positions = positions
        self.logprobs = logprobs
        # Whether the tokens follow from logits, temperature and seed alone, and nothing else is asked for.
        self.is_plain = processor is None and not logprobs and not parameters.truncates
        self._processor = processor
        self._base = processor.length if processor else 0
        self._paths = paths
        self._errors: dict[int, GrammarError] = {}

    def changes(self, row: int) -> LogitChanges | None:
        """How the logits after `row` are changed; None if they are not."""
        path = self._paths[row] if self._processor else None
        if self._processor is None or path is None:
            return None
        self._processor.truncate(self._base)
        self._processor.extend(path)
        return self._processor.changes()

    def all_changes(self, rows: int) -> list[tuple[int, LogitChanges]]:
        """The rows below `rows` whose logits are changed, and how."""
        changes = []
        for row in range(rows):
            try:
                changed = self.changes(row)
            except GrammarError as error:
                self._errors[row] = error
                continue
            if changed is not None:
                changes.append((row, changed))
        return changes

    def result(self, tokens: list[SampledToken]) -> SampledTokens:
        """The tokens that were sampled after the rows, with the errors of `all_changes`."""
        return PartlySampledTokens(tokens, self._errors) if self._errors else tokens

    def sample(self, row: int, logits: npt.NDArray[np.float32], sampler: CoupledSampler) -> SampledToken:
        """Sample the token after `row` from its logits (V,), on a CPU."""
        changes = self.changes(row)
        processed = changes.apply(logits) if changes else logits
        best = sampler.rank(processed, self.parameters, self.positions[row], count=2)
        second = best.scores[1] if len(best.scores) > 1 else -math.inf
        logprobs = _token_logprobs(logits, best.ids[0], self.logprobs - 1) if self.logprobs else None
        return SampledToken(best.ids[0], best.scores[0] - second, logprobs)


class PartlySampledTokens:
    """The tokens after the rows of a segment, of which some could not be sampled; that is raised when one is asked for.

    A grammar may be too costly on the path of a draft that the target does not choose.
    """

    def __init__(self, tokens: list[SampledToken], errors: dict[int, GrammarError]) -> None:
        self._tokens = tokens
        self._errors = errors

    def __getitem__(self, row: int) -> SampledToken:
        if row in self._errors:
            raise self._errors[row]
        return self._tokens[row]


class PlainSampledTokens:
    """The tokens after the rows of a segment, as they come from the device with those of all rows of a forward.

    Args:
        ids, margins: of all rows; see `SampledToken`.
        first: the first row of the segment.
    """

    def __init__(self, ids: list[float], margins: list[float], first: int) -> None:
        self._ids, self._margins, self._first = ids, margins, first

    def __getitem__(self, row: int) -> SampledToken:
        return SampledToken(int(self._ids[self._first + row]), self._margins[self._first + row])


class LazySampledTokens:
    """Samples the token after a row of a segment when it is asked for; on a CPU.

    Args:
        logits: (rows, V) float32.
        sampling: how the rows are sampled.
        sampler: the numpy form.
    """

    def __init__(self, logits: torch.Tensor, sampling: RowSampling, sampler: CoupledSampler) -> None:
        self.logits = logits
        self._rows = logits.numpy()
        self._sampling = sampling
        self._sampler = sampler

    def __getitem__(self, row: int) -> SampledToken:
        return self._sampling.sample(row, self._rows[row], self._sampler)


class SamplingBatch(NamedTuple):
    """Sampling parameters of the rows of one forward; tensors are on the forward's device.

    Attributes:
        seeds: (rows,) int64 with the bits of the unsigned seeds.
        positions: (rows,) int64, absolute positions of the tokens to sample.
        temperatures: (rows,) float64.
        truncated: ranges of rows to which top-k, top-p or min-p applies, with their parameters.
        greedy: all rows have temperature 0.
        changes: rows whose logits are processed, ascending, and how; on the host.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    temperatures: torch.Tensor
    truncated: list[tuple[slice, Sampling]]
    greedy: bool
    changes: list[tuple[int, LogitChanges]]

    @classmethod
    def from_segments(
        cls,
        segments: Iterable[tuple[Sampling, list[int]]],
        device: torch.device,
        rows: int = 0,
        changes: Sequence[tuple[int, LogitChanges]] = (),
    ) -> SamplingBatch:
        """The parameters of consecutive segments.

        Args:
            segments: sampling parameters of each segment, and the positions of the tokens to sample.
            rows: pad to this many rows with greedy ones.
            changes: rows whose logits are processed, ascending, and how.
        """
        seeds: list[int] = []
        positions: list[int] = []
        temperatures: list[float] = []
        truncated: list[tuple[slice, Sampling]] = []
        for sampling, segment_positions in segments:
            count = len(segment_positions)
            if sampling.truncates:
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
        return cls(
            seeds=integers[0],
            positions=integers[1],
            temperatures=floats,
            truncated=truncated,
            greedy=greedy,
            changes=list(changes),
        )

    def slice_rows(self, start: int, stop: int) -> SamplingBatch:
        """The parameters of rows `start` to `stop`."""
        truncated = [
            (slice(max(rows.start, start) - start, min(rows.stop, stop) - start), sampling)
            for rows, sampling in self.truncated
            if rows.start < stop and start < rows.stop
        ]
        changes = [(row - start, changed) for row, changed in self.changes if start <= row < stop]
        rows = slice(start, stop)
        return self._replace(
            seeds=self.seeds[rows],
            positions=self.positions[rows],
            temperatures=self.temperatures[rows],
            truncated=truncated,
            changes=changes,
        )


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


def sample_segments(
    logits: torch.Tensor, segments: Sequence[tuple[RowSampling | None, int]]
) -> list[SampledTokens | None]:
    """Sample after all rows of consecutive segments, on the device.

    How their logits are processed is computed on the host, which a forward that still runs does not delay.

    Args:
        logits: (rows, V), perhaps with padding after the rows of the segments.
        segments: how the rows of each are sampled, None if not at all, and their number.
    """
    starts = list(itertools.accumulate((count for _, count in segments), initial=0))
    chosen_rows = [
        (slice(start, start + count), sampling)
        for start, (sampling, count) in zip(starts, segments, strict=False)
        if sampling
    ]
    parameters = [(s.parameters, s.positions) if s else (GREEDY, [0] * count) for s, count in segments]
    changes = [
        (rows.start + row, changed)
        for rows, sampling in chosen_rows
        for row, changed in sampling.all_changes(rows.stop - rows.start)
    ]
    chosen = sample_tokens(logits, SamplingBatch.from_segments(parameters, logits.device, len(logits), changes))
    logprobs: list[TokenLogprobs | None] = [None] * len(logits)
    for rows, sampling in chosen_rows:
        if sampling.logprobs:
            logprobs[rows] = measure_logprobs(logits[rows], chosen[0, rows], sampling.logprobs - 1)
    tokens, margins = chosen.tolist()
    sampled = list(map(SampledToken, map(int, tokens), margins, logprobs))
    return [
        sampling.result(sampled[start : start + count]) if sampling else None
        for start, (sampling, count) in zip(starts, segments, strict=False)
    ]


def coupled_scores(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Coupled scores logits / T + noise of the candidates, -inf for all other tokens.

    (rows, V) -> (rows, V), float64, or float32 if all rows are greedy.
    """
    logits = process_rows(logits, batch.changes) if batch.changes else logits.float()
    if batch.greedy:
        return logits if batch.changes else logits.clone()
    temperatures = batch.temperatures[:, None]
    sampled = temperatures > 0
    scaled = logits.double() / torch.where(sampled, temperatures, 1.0)
    u = _uniforms(position_keys(batch.seeds, batch.positions), torch.arange(logits.shape[1], device=logits.device))
    scores = torch.where(sampled, scaled - torch.log(-torch.log(u)), scaled)
    for rows, sampling in batch.truncated:
        scores[rows].masked_fill_(excluded_mask(logits[rows], scaled[rows], sampling), -torch.inf)
    return scores


def process_rows(logits: torch.Tensor, changes: list[tuple[int, LogitChanges]]) -> torch.Tensor:
    """Apply the changes of some rows, bit-equal to `LogitChanges.apply`: (rows, V) any dtype -> (rows, V) float32."""
    size, device = logits.shape[1], logits.device
    processed = logits.to(torch.float32, copy=True)
    known = [changed.below(size) for _, changed in changes]
    rows = np.repeat([row for row, _ in changes], [changed.ids.size for changed in known])
    index = _to_device(np.stack([rows, np.concatenate([changed.ids for changed in known])]), device)
    floats = np.stack([np.concatenate([changed[column] for changed in known]) for column in (1, 2, 3)])
    bias, penalties, subtracted = _to_device(floats, device)
    x = processed[index[0], index[1]] + bias
    # Division by a tensor: by a number, CUDA multiplies with its rounded reciprocal.
    processed[index[0], index[1]] = torch.where(x < 0, x * penalties, x / penalties) - subtracted
    masked = [(row, changed.allowed) for row, changed in changes if changed.allowed is not None]
    if masked:
        masks = _to_device(np.stack([mask for _, mask in masked]), device)
        bits = (masks[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
        excluded = torch.ones(len(masked), size, dtype=torch.bool, device=device)
        covered = bits.flatten(1)[:, :size]
        excluded[:, : covered.shape[1]] = covered == 0
        mask_rows = _to_device(np.array([row for row, _ in masked]), device)
        processed[mask_rows] = processed[mask_rows].masked_fill(excluded, -torch.inf)
    return processed


def measure_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> list[TokenLogprobs]:
    """The log-probabilities of each row, on the device; equal to those on a CPU but for rounding.

    Args:
        logits: (rows, V), not processed.
        tokens: (rows,) the token after each row.
        count: how many of the most probable tokens to add.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(logits), max(1, MAX_SCORES_AT_ONCE // logits.shape[1])):
        rows = slice(start, start + max(1, MAX_SCORES_AT_ONCE // logits.shape[1]))
        logprobs = logits[rows].double().log_softmax(-1)
        own = logprobs.gather(1, tokens[rows, None].long())[:, 0].tolist()
        # A stable sort: of equal logits, frequent in low precision, the lower id comes first.
        values, ids = logprobs.sort(dim=-1, descending=True, stable=True) if count else (logprobs, tokens[rows, None])
        top = zip(ids[:, :count].tolist(), values[:, :count].tolist(), strict=True)
        entries += [_make_logprobs(each, *best) for each, best in zip(own, top, strict=True)]
    return entries


def _token_logprobs(logits: npt.NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """The log-probabilities of one row (V,), on a CPU, with the `count` most probable tokens."""
    shifted = logits.astype(np.float64) - logits.max()
    shifted -= math.log(np.exp(shifted).sum())
    top = np.empty(0, np.int64)
    if count:
        count = min(count, shifted.size)
        top = np.flatnonzero(shifted >= np.partition(shifted, -count)[-count])
        top = top[np.lexsort((top, -shifted[top]))][:count]
    return _make_logprobs(float(shifted[token]), top.tolist(), shifted[top].tolist())


def _make_logprobs(own: float, ids: list[int], values: list[float]) -> TokenLogprobs:
    """Round the log-probabilities as they travel, so that every encoding of a frame has the same."""
    return TokenLogprobs(
        _round_logprob(own), [(i, _round_logprob(value)) for i, value in zip(ids, values, strict=True)]
    )


def _round_logprob(value: float) -> float:
    return round(max(MIN_LOGPROB, min(0.0, value)) * LOGPROB_UNITS) / LOGPROB_UNITS


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def excluded_mask(logits: torch.Tensor, scaled: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The tokens that top-k, top-p and min-p exclude: (rows, V) bool.

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
    if sampling.min_p:
        excluded |= scaled < scaled.amax(-1, keepdim=True) + math.log(sampling.min_p)
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
