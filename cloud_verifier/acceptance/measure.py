"""How often a draft's token equals the target's: the one measurement that every tool reports acceptance from.

A measurement follows given token ids (teacher forcing). At every judged position draft and target choose the next token
from the same true prefix with the same coupled noise (`edge_runtime.protocol.sampling`), and the draft is accepted iff
the two tokens are equal. Acceptance is therefore a property of the position: it can be counted without decoding, and
many plans can be evaluated from one pass.

The steps are: a `Passage` states ids, judged positions and sampling parameters; `propose_tokens` (the board's ONNX
draft) or `rank_tokens` (logits of a PyTorch draft) give the draft's tokens; `judged_logits` and `choose_tokens` give
the target's; `count_accepted` compares them text by text, in the form that `acceptance.bootstrap` takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

from cloud_verifier.model.sampling import SamplingBatch, coupled_scores, sample_tokens
from edge_runtime.draft import DraftContext, Proposal
from edge_runtime.protocol.sampling import CoupledSampler, Sampling

# Reported by default: greedy decoding, a common chat setting, and unmodified sampling.
TEMPERATURES = (0.0, 0.7, 1.0)
# Python, C++ and prose of this project. No model was trained on it. It is never regenerated from the current sources,
# so that figures and bundles do not change with them.
CALIBRATION_FILE = "calibration.txt"
# Chosen: 512 MB of float32 logits in one forward.
MAX_LOGITS_AT_ONCE = 1 << 27
# Chosen: 128 MB of float64 scores.
MAX_SCORES_AT_ONCE = 1 << 24

# Consecutive rows of logits: their sampling parameters, and the absolute position of the token that each row predicts.
Segments = Sequence[tuple[Sampling, list[int]]]


def read_calibration_text() -> str:
    """Return the fixed text that acceptance and parity are measured on when no other text is given."""
    return (files("cloud_verifier.acceptance") / CALIBRATION_FILE).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Passage:
    """Token ids and the part of them that is judged.

    Attributes:
        ids: all tokens.
        start: first judged position, at least 1; all positions from there on are judged.
        sampling: how draft and target choose the tokens of these positions.
    """

    ids: list[int]
    start: int
    sampling: Sampling

    @property
    def positions(self) -> list[int]:
        """The judged positions."""
        return list(range(self.start, len(self.ids)))


@dataclass(frozen=True)
class RankedTokens:
    """A draft's tokens for the judged positions of a passage, each given the true ids before it.

    Attributes:
        candidates: for each position, ids by coupled score, best first; the first is the draft token.
        confidences: for each position, the draft's probability of the draft token.
    """

    candidates: list[list[int]]
    confidences: list[float]


def propose_tokens(context: DraftContext, passage: Passage, *, siblings: int = 0) -> Iterator[Proposal]:
    """Draft one token for each judged position with the board's runner, given the true ids before it.

    Args:
        context: empty.
        siblings: number of alternatives to each draft token.
    """
    for position in passage.positions:
        yield context.propose_next(passage.ids[:position], passage.sampling, siblings)


def judged_logits(model: Any, passages: Sequence[Passage]) -> Iterator[torch.Tensor]:
    """Run a transformers causal language model over passages, several in one forward.

    Yields for each passage the logits that predict its judged positions, (positions, V) float32 on the model's device.
    """
    longest = max(len(passage.ids) for passage in passages)
    rows = max(1, MAX_LOGITS_AT_ONCE // (longest * int(model.config.vocab_size)))
    for first in range(0, len(passages), rows):
        batch = passages[first : first + rows]
        # The last id predicts nothing that is judged. Right padding needs no mask: attention is causal.
        width = max(len(passage.ids) for passage in batch) - 1
        ids = torch.tensor([(passage.ids[:-1] + [0] * width)[:width] for passage in batch], device=model.device)
        with torch.inference_mode():  # a decorator would leave the mode at the generator's first yield
            logits = model(input_ids=ids, use_cache=False).logits
        for row, passage in zip(logits, batch, strict=True):
            yield row[passage.start - 1 : len(passage.ids) - 1].float()


def choose_tokens(logits: torch.Tensor, segments: Segments) -> list[int]:
    """Choose the token that each row of logits predicts, with the coupled noise.

    Args:
        logits: (rows, V) float32 on any device. On a CPU the numpy sampler is used, which computes only the few scores
            that can decide; on an accelerator all rows are chosen on the device.
        segments: sampling parameters of consecutive rows.
    """
    if logits.device.type != "cpu":
        batch = SamplingBatch.from_segments(segments, logits.device)
        return [int(token) for token in sample_tokens(logits, batch)[0].tolist()]
    sampler = _coupled_sampler(logits.shape[-1])
    parameters = [(sampling, position) for sampling, positions in segments for position in positions]
    return [
        sampler.rank(row, sampling, position).ids[0]
        for row, (sampling, position) in zip(logits.numpy(), parameters, strict=True)
    ]


def rank_tokens(logits: torch.Tensor, passage: Passage, count: int) -> RankedTokens:
    """Rank the `count` best tokens by coupled score for each judged position.

    Args:
        logits: (positions, V) float32, from `judged_logits` of the draft.
    """
    candidates: list[list[int]] = []
    confidences: list[float] = []
    temperature = passage.sampling.temperature or 1.0
    step = max(1, MAX_SCORES_AT_ONCE // logits.shape[-1])
    positions = passage.positions
    for first in range(0, len(positions), step):
        rows, some = logits[first : first + step], positions[first : first + step]
        scores = coupled_scores(rows, SamplingBatch.from_segments([(passage.sampling, some)], rows.device))
        best = scores.topk(min(count, rows.shape[-1]), dim=-1).indices
        candidates += best.tolist()
        confidences += (rows / temperature).softmax(-1).gather(-1, best[:, :1])[:, 0].tolist()
    return RankedTokens(candidates, confidences)


def count_accepted(drafted: Sequence[int], chosen: Sequence[int]) -> tuple[int, int]:
    """Count the accepted positions of one text: (accepted, all), as `Bootstrap.ratio` takes them."""
    return sum(a == b for a, b in zip(drafted, chosen, strict=True)), len(chosen)


@functools.lru_cache(maxsize=4)
def _coupled_sampler(vocabulary_size: int) -> CoupledSampler:
    return CoupledSampler(vocabulary_size)
