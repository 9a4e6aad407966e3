"""Prefix caches that reach no further than one sample.

All systems get the same prompts, one after the other. Turns of a conversation shall begin with what earlier turns left
in the caches, but no sample with what another sample left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from cloud_verifier.model.prefix_cache import CacheScope, PrefixCache
from edge_runtime.draft.prefix_cache import DraftPrefixCache


class SampleIsolation:
    """Separates samples in the prefix caches of this process, as the caches separate owners.

    Attributes:
        sample: number of the present one.
    """

    def __init__(self) -> None:
        self.sample = 0

    def install(self) -> None:
        """Apply to all prefix caches of this process."""
        for cache_class, name in ((PrefixCache, "open"), (DraftPrefixCache, "take"), (DraftPrefixCache, "keep")):
            setattr(cache_class, name, self._separate(getattr(cache_class, name)))

    def _separate(self, method: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(method)

        @functools.wraps(method)
        def separated(*arguments: Any, **named: Any) -> Any:
            bound = parameters.bind(*arguments, **named)
            bound.apply_defaults()
            if "scope" in bound.arguments:
                scope: CacheScope = bound.arguments["scope"]
                bound.arguments["scope"] = scope._replace(owner=f"{self.sample} {scope.owner}")
            else:
                bound.arguments["owner"] = f"{self.sample} {bound.arguments['owner']}"
            return method(*bound.args, **bound.kwargs)

        return separated
