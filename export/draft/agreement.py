"""Measures the agreement of a draft with its target on held-out text under teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from cloud_verifier.acceptance.measure import TEMPERATURES, choose_tokens, count_accepted
from edge_runtime.protocol.sampling import Sampling
from export.draft.distill import kl_divergence, overlap

# A text as token ids, and the first position that is judged, at least 1.
JudgedText = tuple[Sequence[int], int]
# Chosen: 1.6 GB of float32 logits of a vocabulary of 49k at once.
MAX_LOGITS_AT_ONCE = 400_000_000
ROUND_TOKENS = 4


@dataclass(frozen=True)
class Agreement:
    """Means over the judged positions.

    Attributes:
        positions: number of positions compared.
        accepted: acceptance rate by temperature, as `T=0.7`: share of positions where both draw the same token.
        round_tokens: tokens per round at K=4, likewise: accepted tokens and the target's own.
        overlap: sum min(p, q) at temperature 1: upper bound of the acceptance rate of any verification rule.
        kl: KL(target || draft) in nats.
        target_loss: cross-entropy of the target on the text, in nats.
    """

    positions: int
    accepted: dict[str, float]
    round_tokens: dict[str, float]
    overlap: float
    kl: float
    target_loss: float

    def record(self) -> dict[str, object]:
        """Return the values as plain data."""
        return asdict(self)


@torch.inference_mode()
def measure_agreement(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    texts: Sequence[JudgedText],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> Agreement:
    """Compare draft and target at all judged positions of `texts`. Text i is sampled with `seed` + i."""
    sums, positions = torch.zeros(3, dtype=torch.float64), 0
    accepted = dict.fromkeys(temperatures, 0)
    rounds = dict.fromkeys(temperatures, 0)
    for first, batch in _batches(texts, int(target.config.vocab_size)):
        width = max(len(ids) for ids, _ in batch) - 1
        # Right padding needs no mask: attention is causal.
        inputs = torch.tensor([([*ids][:-1] + [0] * width)[:width] for ids, _ in batch], device=target.device)
        target_logits, draft_logits = (model(input_ids=inputs, use_cache=False).logits for model in (target, draft))
        for row, (ids, start) in enumerate(batch):
            # Logits at a position predict the next one.
            predicting = slice(start - 1, len(ids) - 1)
            p, q = target_logits[row, predicting].float(), draft_logits[row, predicting].float()
            actual = torch.tensor([*ids][start:], device=p.device)
            for temperature in temperatures:
                sampling = Sampling(temperature=temperature, seed=seed + first + row)
                segments = [(sampling, list(range(start, len(ids))))]
                chosen, drafted = choose_tokens(p, segments), choose_tokens(q, segments)
                accepted[temperature] += count_accepted(drafted, chosen)[0]
                rounds[temperature] += count_rounds([a == b for a, b in zip(chosen, drafted, strict=True)])
            sums += torch.stack(
                [
                    overlap(p, q).double().sum(),
                    kl_divergence(p, q).double().sum(),
                    functional.cross_entropy(p, actual, reduction="sum").double(),
                ]
            ).cpu()
            positions += len(ids) - start
    return Agreement(
        positions,
        {f"T={temperature:g}": round(count / positions, 4) for temperature, count in accepted.items()},
        {f"T={temperature:g}": round(positions / count, 3) for temperature, count in rounds.items()},
        *(round(value, 4) for value in (sums / positions).tolist()),
    )


def count_rounds(accepted: Sequence[bool], draft_tokens: int = ROUND_TOKENS) -> int:
    """Count the rounds that decode a text whose position i is accepted iff `accepted[i]`."""
    rounds = position = 0
    while position < len(accepted):
        end = position + draft_tokens
        while position < min(end, len(accepted)) and accepted[position]:
            position += 1
        position += 1
        rounds += 1
    return rounds


def _batches(texts: Sequence[JudgedText], vocabulary_size: int) -> Iterator[tuple[int, Sequence[JudgedText]]]:
    """Divide texts into batches that fit into memory: (index of the first text, batch)."""
    longest = max(len(ids) for ids, _ in texts)
    rows = max(1, MAX_LOGITS_AT_ONCE // (longest * vocabulary_size))
    for first in range(0, len(texts), rows):
        yield first, texts[first : first + rows]
