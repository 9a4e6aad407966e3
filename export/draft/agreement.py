"""How often a draft says what a target says, on text that neither was trained on, word for word (teacher forcing)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from export.data.token_stream import TokenStream
from export.draft.distill import kl_divergence, overlap

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Agreement:
    """Means over positions.

    Attributes:
        positions: how many were compared.
        greedy: share where both have the same likeliest token: acceptance at temperature 0.
        coupled: share where both draw the same token from the same noise: acceptance at temperature 1, one draw
            per position.
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
    device = text.ids.device
    random = torch.Generator(device).manual_seed(seed)
    available = max(1, len(text.ids) // length)
    stride = max(1, available // windows)
    sums, positions = torch.zeros(5, dtype=torch.float64), 0
    # Every `stride`-th window, so that a long stream is seen from end to end.
    rows = torch.cat(list(text.consecutive(available, length)))[::stride][:windows]
    for ids in rows.split(ROWS_AT_ONCE):
        wanted = target(input_ids=ids, use_cache=False).logits.float()  # (rows, length, vocabulary)
        given = draft(input_ids=ids, use_cache=False).logits.float()
        # Gumbel noise: argmax(logits + noise) is a draw from softmax(logits).
        noise = -torch.rand(wanted.shape, generator=random, device=device).clamp_min(1e-20).log().neg().log()
        sums += torch.stack(
            [
                (wanted.argmax(-1) == given.argmax(-1)).double().sum(),
                ((wanted + noise).argmax(-1) == (given + noise).argmax(-1)).double().sum(),
                overlap(wanted, given).double().sum(),
                kl_divergence(wanted, given).double().sum(),
                # The last position of a row has no next token: scale its sum up to all positions.
                functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double() * ids.numel(),
            ]
        ).cpu()
        positions += ids.numel()
    return Agreement(positions, *(round(value, 4) for value in (sums / positions).tolist()))
