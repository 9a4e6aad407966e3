"""Reference decoding: plain autoregressive generation by the target, with which every other text is compared.

Deliberately independent of the engine: transformers' own `generate`, with its cache and masks, and the rule of sampling
as a logits processor. No tree, no padding, no rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from edge_runtime.protocol.sampling import CoupledSampler, Sampling


class CoupledLogitsProcessor(LogitsProcessor):
    """Leaves only the token that the sampling rule chooses.

    Args:
        vocabulary_size: number of logits.
    """

    def __init__(self, sampling: Sampling, vocabulary_size: int) -> None:
        self._sampling = sampling
        self._sampler = CoupledSampler(vocabulary_size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores after `input_ids` (1, length): (1, V) -> (1, V)."""
        logits = scores[0].float().cpu().numpy()
        token = self._sampler.rank(logits, self._sampling, input_ids.shape[1]).ids[0]
        chosen = torch.full_like(scores, -torch.inf)
        chosen[0, token] = 0.0
        return chosen


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
    if not max_new_tokens:
        return []
    # transformers' stubs miss its annotations.
    config_class: Any = GenerationConfig
    ids = torch.tensor([prompt], device=model.device)
    sampler = CoupledLogitsProcessor(sampling, model.config.get_text_config(decoder=True).vocab_size)
    end = None if sampling.ignore_eos else sorted(end_ids) or None
    # `generate` adds what the model's own settings say, such as penalties, to those that it is given.
    model_config, model.generation_config = model.generation_config, config_class()
    try:
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config_class(max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=0),
            logits_processor=LogitsProcessorList([sampler]),
        )
    finally:
        model.generation_config = model_config
    new_ids: list[int] = text[0, len(prompt) :].tolist()
    return new_ids
