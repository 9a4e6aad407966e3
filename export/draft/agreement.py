"""Measure the agreement of a draft with its target on held-out text under teacher forcing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from cloud_verifier.acceptance.measure import choose_tokens, count_accepted
from edge_runtime.protocol.sampling import Sampling
from export.data.token_stream import TokenStream
from export.draft.distill import kl_divergence, overlap

BATCH_ROWS = 16


@dataclass(frozen=True)
class Agreement:
    """Means over positions.

    Attributes:
        positions: number of positions compared.
        greedy: share of positions with equal argmax: acceptance rate at temperature 0.
        coupled: share of positions where both draw the same token with the coupled noise: acceptance rate at
            temperature 1, from one draw per position.
        overlap: sum min(p, q) at temperature 1: upper bound of the acceptance rate of any verification rule.
        kl: KL(target || draft) in nats.
        target_loss: cross-entropy of the target on the text, in nats.
    """

    positions: int
    greedy: float
    coupled: float
    overlap: float
    kl: float
    target_loss: float

    def record(self) -> dict[str, float]:
        """Return the values as plain data."""
        return asdict(self)


@torch.inference_mode()
def measure_agreement(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    text: TokenStream,
    *,
    windows: int,
    length: int,
    seed: int = 0,
) -> Agreement:
    """Compare draft and target on at most `windows` windows of `length` tokens, spread over `text`."""
    sums, positions = torch.zeros(3, dtype=torch.float64), 0
    accepted = {0.0: 0, 1.0: 0}
    rows = text.consecutive_windows(length)
    # A stride spreads the windows over the whole stream.
    rows = rows[:: max(1, len(rows) // windows)][:windows]
    for first in range(0, len(rows), BATCH_ROWS):
        ids = rows[first : first + BATCH_ROWS]
        target_logits = target(input_ids=ids, use_cache=False).logits.float()  # (rows, length, vocabulary)
        draft_logits = draft(input_ids=ids, use_cache=False).logits.float()
        for temperature in accepted:
            # Each row is sampled as a separate request whose first token is at position 0.
            segments = [
                (Sampling(temperature=temperature, seed=seed + first + row), list(range(1, length + 1)))
                for row in range(len(ids))
            ]
            chosen, drafted = (
                choose_tokens(logits.flatten(0, 1), segments) for logits in (target_logits, draft_logits)
            )
            accepted[temperature] += count_accepted(drafted, chosen)[0]
        sums += torch.stack(
            [
                overlap(target_logits, draft_logits).double().sum(),
                kl_divergence(target_logits, draft_logits).double().sum(),
                # The last position of a row has no next token, so that the mean is scaled to all positions.
                functional.cross_entropy(target_logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double()
                * ids.numel(),
            ]
        ).cpu()
        positions += ids.numel()
    shares = [count / positions for count in accepted.values()]
    return Agreement(positions, *(round(value, 4) for value in (*shares, *(sums / positions).tolist())))
