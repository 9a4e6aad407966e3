"""The two sides of an evaluation: drafts, which propose tokens, and targets, which choose them.

A draft may be a bundle on the board's own runner, a PyTorch model, or anything else with the methods of `Proposer`. All
of them sample with the coupled noise that board and verifier share (`edge_runtime.protocol.sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from cloud_verifier.acceptance.measure import (
    Passage,
    RankedTokens,
    choose_tokens,
    judged_logits,
    propose_tokens,
    rank_tokens,
)
from cloud_verifier.model.pretrained import generation_end_ids
from edge_runtime.draft import OnnxDraft
from edge_runtime.planning.board_profile import cache_bytes, weight_bytes
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation import MAX_SIBLINGS

# Chosen: batch size at which a target generates, by device; a small model on a GPU takes equally long for more rows.
GENERATED_ROWS, GPU_GENERATED_ROWS = 64, 256


class Proposer(Protocol):
    """A draft under evaluation.

    Attributes:
        vocabulary_size: number of ids.
        context: longest text in tokens.
        weight_bytes, cache_bytes: what a decode step reads on a board (see `planning.board_profile`); if
            weight_bytes is 0 (unknown), no speed is modeled.
    """

    vocabulary_size: int
    context: int
    weight_bytes: int
    cache_bytes: int

    def propose(self, passages: Sequence[Passage]) -> list[RankedTokens]:
        """Propose tokens for every passage."""


class OnnxProposer:
    """A bundle on the board's runner, one token at a time."""

    def __init__(self, draft: OnnxDraft) -> None:
        self._draft = draft
        manifest = draft.manifest
        self.vocabulary_size = manifest.architecture.vocabulary_size
        self.context = manifest.architecture.context
        self.weight_bytes, self.cache_bytes = weight_bytes(manifest), cache_bytes(manifest)

    def propose(self, passages: Sequence[Passage]) -> list[RankedTokens]:
        """See `Proposer`."""
        ranked = []
        for passage in passages:
            proposals = list(propose_tokens(self._draft.new_context(), passage, siblings=MAX_SIBLINGS))
            candidates = [proposal.tokens + proposal.siblings.get(0, []) for proposal in proposals]
            ranked.append(RankedTokens(candidates, [proposal.confidences[0] for proposal in proposals]))
        return ranked


class TorchProposer:
    """A PyTorch draft on any device.

    Args:
        model: a transformers causal language model, in eval mode.
        weight_bytes, cache_bytes: see `Proposer`.
    """

    def __init__(self, model: Any, weight_bytes: int = 0, cache_bytes: int = 0) -> None:
        self._model = model
        self.vocabulary_size = model.config.vocab_size
        self.context = model.config.max_position_embeddings
        self.weight_bytes, self.cache_bytes = weight_bytes, cache_bytes

    def propose(self, passages: Sequence[Passage]) -> list[RankedTokens]:
        """See `Proposer`."""
        return [
            rank_tokens(logits, passage, 1 + MAX_SIBLINGS)
            for passage, logits in zip(passages, judged_logits(self._model, passages), strict=True)
        ]


class TargetWriter:
    """A target: chooses the token at every position of a given text, and generates text of its own.

    Args:
        model: a transformers causal language model, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._end_ids = set(generation_end_ids(model.generation_config))
        self.vocabulary_size: int = model.config.vocab_size
        self.context: int = model.config.max_position_embeddings

    def choose(self, passages: Sequence[Passage]) -> list[list[int]]:
        """Choose the token for every judged position, given the text before it."""
        return [
            choose_tokens(logits, [(passage.sampling, passage.positions)])
            for passage, logits in zip(passages, judged_logits(self._model, passages), strict=True)
        ]

    def generate(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], count: int) -> list[list[int]]:
        """Generate up to `count` tokens after each prompt; the end-of-text token is included.

        Args:
            samplings: one for each prompt.
        """
        texts: list[list[int]] = []
        size = GPU_GENERATED_ROWS if self._model.device.type == "cuda" else GENERATED_ROWS
        for first in range(0, len(prompts), size):
            rows = slice(first, first + size)
            texts += self._generate_batch(prompts[rows], samplings[rows], count)
        return texts

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], count: int
    ) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        device, width = self._model.device, max(map(len, prompts))
        # Left padding, so that all rows continue in the same column; padded positions are masked.
        step = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        positions, cache = (mask.cumsum(-1) - 1).clamp_min(0), None
        for index in range(count):
            output = self._model(
                input_ids=step,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            segments = [(own, [len(prompt) + index]) for prompt, own in zip(prompts, samplings, strict=True)]
            tokens = choose_tokens(logits, segments)
            for row, token in enumerate(tokens):
                if not ended[row]:
                    texts[row].append(token)
                    ended[row] = token in self._end_ids
            if all(ended):
                break
            # Rows that have ended stay in the batch, so that all forwards have one shape; their tokens are dropped.
            step = torch.tensor(tokens, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return texts
