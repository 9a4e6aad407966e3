"""How often a draft says what a target says, on text that neither was trained on, word for word (teacher forcing)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from cloud_verifier.acceptance.measure import choose_tokens, count_accepted
from edge_runtime.protocol.sampling import Sampling
from export.data.token_stream import TokenStream
from export.draft.distill import kl_divergence, overlap

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Agreement:
    """Means over positions.

    Attributes:
        positions: how many were compared.
        greedy: share where both have the same likeliest token: acceptance at temperature 0.
        coupled: share where both choose the same token with the coupled noise: acceptance at temperature 1, one
            draw per position.
        overlap: sum min(p, q) at temperature 1: the best any rule could do.
        kl: KL(target || draft) in nats.
        target_loss: cross-entropy of the target itself, in nats.
    """

    positions: int
    greedy: float
    coupled: float
    overlap: float
    kl: float
    target_loss: float

    def record(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


@torch.inference_mode()
def measure(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    text: TokenStream,
    *,
    windows: int,
    length: int,
    seed: int = 0,
) -> Agreement:
    """Compares draft and target on at most `windows` windows of `length` tokens, spread over `text`."""
    available = max(1, len(text.ids) // length)
    stride = max(1, available // windows)
    sums, positions = torch.zeros(3, dtype=torch.float64), 0
    accepted = {0.0: 0, 1.0: 0}
    # Every `stride`-th window, so that a long stream is seen from end to end.
    rows = torch.cat(list(text.consecutive(available, length)))[::stride][:windows]
    for first, ids in enumerate(rows.split(ROWS_AT_ONCE)):
        wanted = target(input_ids=ids, use_cache=False).logits.float()  # (rows, length, vocabulary)
        given = draft(input_ids=ids, use_cache=False).logits.float()
        for temperature in accepted:
            # Each row is sampled as a request of its own, whose first token is at position 0.
            segments = [
                (Sampling(temperature=temperature, seed=seed + first * ROWS_AT_ONCE + row), list(range(1, length + 1)))
                for row in range(len(ids))
            ]
            chosen, drafted = (choose_tokens(logits.flatten(0, 1), segments) for logits in (wanted, given))
            accepted[temperature] += count_accepted(drafted, chosen)[0]
        sums += torch.stack(
            [
                overlap(wanted, given).double().sum(),
                kl_divergence(wanted, given).double().sum(),
                # The last position of a row has no next token: scale its sum up to all positions.
                functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double() * ids.numel(),
            ]
        ).cpu()
        positions += ids.numel()
    shares = [count / positions for count in accepted.values()]
    return Agreement(positions, *(round(value, 4) for value in (*shares, *(sums / positions).tolist())))
