"""The target alone: one token after the other, the way everybody decodes. What every other text is compared with.

Deliberately independent of the engine: transformers' own cache and masks, no tree, no padding, no rounds.
"""

from __future__ import annotations

from typing import Any

import torch

from edge_runtime.protocol.sampling import Chooser, Sampling


@torch.inference_mode()
def decode_alone(
    model: Any, prompt: list[int], sampling: Sampling, max_new_tokens: int, end_ids: frozenset[int]
) -> list[int]:
    """The text that `model` writes by itself.

    Args:
        model: a transformers causal language model, in eval mode.
        prompt: at least one id.
        sampling: warping and seed.
        max_new_tokens: upper bound.
        end_ids: tokens that end the text, unless `sampling.ignore_eos`.

    Returns the new ids, the end token included.
    """
    chooser = Chooser(model.config.vocab_size)
    new: list[int] = []
    step, cache = torch.tensor([prompt], device=model.device), None
    while len(new) < max_new_tokens:
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1].float().cpu().numpy()
        token = chooser.rank(logits, sampling, len(prompt) + len(new)).ids[0]
        new.append(token)
        if token in end_ids and not sampling.ignore_eos:
            break
        step = torch.tensor([[token]], device=model.device)
    return new
