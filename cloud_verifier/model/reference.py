"""Reference decoding: plain autoregressive generation by the target, with which every other text is compared.

Deliberately independent of the engine: transformers' own `generate`, with its cache and masks, its own processors of
logits in its own order, and the rule of sampling as the last of them. No tree, no padding, no rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.logits_processing import end_ids_of
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


class OccurrencePenaltyLogitsProcessor(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which transformers does not have.

    Args:
        prompt_length: number of tokens that were not generated.
    """

    def __init__(self, sampling: Sampling, prompt_length: int) -> None:
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Lower the scores of generated tokens: (1, V) -> (1, V)."""
        counts = torch.bincount(input_ids[0, self._prompt_length :], minlength=scores.shape[1]).double()
        # In float64: PyTorch would compute the product of a number and a truth value in float32.
        return scores - (self._frequency * counts + self._presence * (counts > 0).double()).float()


class GrammarLogitsProcessor(LogitsProcessor):
    """Excludes the tokens with which a text cannot match a grammar, by llguidance's own functions for numpy.

    Args:
        end_ids: tokens that end a text of the model.
        prompt_length: number of tokens that were not generated.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer, end_ids: frozenset[int], prompt_length: int) -> None:
        self._grammar, self._definition = grammar, tokenizer.to_str()
        self._end_ids, self._prompt_length = sorted(end_ids), prompt_length
        self._tokenizer: LLTokenizer | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores after `input_ids` (1, length): (1, V) -> (1, V)."""
        size = scores.shape[1]
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._definition, n_vocab=size, eos_token=self._end_ids)
        generated = input_ids[0, self._prompt_length :].tolist()
        if set(self._end_ids) & set(generated):
            # After an end token that is ignored, only end tokens follow.
            allowed = torch.full_like(scores, -torch.inf)
            allowed[:, self._end_ids] = 0.0
            return scores + allowed
        matcher = LLMatcher(self._tokenizer, self._grammar, log_level=0)
        if not matcher.consume_tokens(generated) or matcher.is_error():
            raise GrammarError(f"the grammar is invalid, or the text does not match it: {matcher.get_error()[:300]}")
        bitmask = allocate_token_bitmask(1, size)
        fill_next_token_bitmask(matcher, bitmask)
        masked = scores.float().cpu().numpy().copy()
        apply_token_bitmask_inplace(masked, bitmask)
        return torch.from_numpy(masked).to(scores.device)


class MinTokensLogitsProcessor(LogitsProcessor):
    """Excludes the tokens that end the text while it is too short, unless a grammar allows nothing else.

    Args:
        end_ids: tokens that end the text.
        prompt_length: number of tokens that were not generated.
    """

    def __init__(self, min_tokens: int, end_ids: frozenset[int], prompt_length: int, device: torch.device) -> None:
        self._processor = MinNewTokensLengthLogitsProcessor(
            prompt_length, min_tokens, sorted(end_ids), device=str(device)
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores after `input_ids` (1, length): (1, V) -> (1, V)."""
        masked: torch.Tensor = self._processor(input_ids, scores)
        return masked if torch.isfinite(masked).any() else scores


def make_logits_processors(
    sampling: Sampling,
    vocabulary_size: int,
    prompt_length: int,
    end_ids: frozenset[int],
    device: torch.device,
    *,
    tokenizer: Tokenizer | None = None,
) -> LogitsProcessorList:
    """The processors of one text in transformers' order, and the sampling rule.

    Args:
        end_ids: tokens that end a text of the model, unless `sampling.ignore_eos`; `sampling.stop_ids` do, too.
        tokenizer: the model's; needed for a grammar.
    """
    text_end_ids = end_ids_of(sampling, end_ids)
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        # Its stubs know only the form in which token 0 is refused.
        sequence_bias: Any = {(token,): bias for token, bias in sampling.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(sequence_bias))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(OccurrencePenaltyLogitsProcessor(sampling, prompt_length))
    if sampling.grammar:
        assert tokenizer is not None, "a grammar needs the tokenizer"
        processors.append(GrammarLogitsProcessor(sampling.grammar, tokenizer, end_ids, prompt_length))
    if sampling.min_tokens and text_end_ids:
        processors.append(MinTokensLogitsProcessor(sampling.min_tokens, text_end_ids, prompt_length, device))
    processors.append(CoupledLogitsProcessor(sampling, vocabulary_size))
    return processors


@torch.inference_mode()
def generate_reference(
    model: Any,
    prompt: list[int],
    sampling: Sampling,
    max_new_tokens: int,
    end_ids: frozenset[int],
    *,
    tokenizer: Tokenizer | None = None,
) -> list[int]:
    """Generate the text of `model` token by token.

    Args:
        model: a transformers causal language model, in eval mode.
        prompt: at least one token id.
        sampling: sampling parameters and seed.
        max_new_tokens: upper bound.
        end_ids, tokenizer: see `make_logits_processors`.

    Returns the new token ids, the end token included.
    """
    if not max_new_tokens:
        return []
    # transformers' stubs miss its annotations.
    config_class: Any = GenerationConfig
    ids = torch.tensor([prompt], device=model.device)
    vocabulary_size = model.config.get_text_config(decoder=True).vocab_size
    end = end_ids_of(sampling, end_ids)
    processors = make_logits_processors(
        sampling, vocabulary_size, len(prompt), end_ids, model.device, tokenizer=tokenizer
    )
    # `generate` adds what the model's own settings say, such as penalties, to those that it is given.
    model_config, model.generation_config = model.generation_config, config_class()
    try:
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config_class(
                max_new_tokens=max_new_tokens, eos_token_id=sorted(end) or None, pad_token_id=0
            ),
            logits_processor=processors,
        )
    finally:
        model.generation_config = model_config
    new_ids: list[int] = text[0, len(prompt) :].tolist()
    return new_ids
