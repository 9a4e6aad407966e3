"""transformers' own cache with keys and values rounded as in a pool of a smaller dtype: the reference for that pool."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from cloud_verifier.model.kv_cache import round_to


class RoundingCache(DynamicCache):
    """A cache for a text of `model` whose keys and values are those that `dtype` has."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(config=model.config)
        self._dtype = dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of a layer; return all of it, also in the forward that computes them rounded."""
        keys, values = (round_to(states, self._dtype).to(states.dtype) for states in (key_states, value_states))
        # Its further arguments depend on transformers' version.
        update: Any = super().update
        updated: tuple[torch.Tensor, torch.Tensor] = update(keys, values, *arguments, **options)
        return updated
