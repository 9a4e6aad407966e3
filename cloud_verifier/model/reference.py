"""Reference decoding: plain autoregressive generation by the target, with which every other text is compared.

Deliberately independent of the engine: transformers' own cache and masks, no tree, no padding, no rounds.
"""

from __future__ import annotations

from typing import Any

import torch

from edge_runtime.protocol.sampling import CoupledSampler, Sampling


@torch.inference_mode()
def generate_reference(
    model: Any, prompt: list[int], sampling: Sampling, max_new_tokens: int, end_ids: frozenset[int]
) -> list[int]:
    """Generate the text of `model` token by token.

    Args:
        model: a transformers causal language model, in eval mode.
        prompt: at least one token id.
        sampling: sampling parameters and seed.
        max_new_tokens: upper bound.
        end_ids: tokens that end the text, unless `sampling.ignore_eos`.

    Returns the new token ids, the end token included.
    """
    sampler = CoupledSampler(model.config.vocab_size)
    generated: list[int] = []
    input_ids, cache = torch.tensor([prompt], device=model.device), None
    while len(generated) < max_new_tokens:
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1].float().cpu().numpy()
        token = sampler.rank(logits, sampling, len(prompt) + len(generated)).ids[0]
        generated.append(token)
        if token in end_ids and not sampling.ignore_eos:
            break
        input_ids = torch.tensor([[token]], device=model.device)
    return generated
