"""The cache of one text in a model of any architecture, driven by transformers' own preparation of inputs.

`GenerationState.feed` does what one step of transformers' `generate` does: the model prepares its inputs, keeps its
cache in the arguments of the next step, and returns logits. It works for every model that generates, whatever it
caches: keys and values, windows of them, recurrent or convolutional states, attributes of its modules, or nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers.generation.configuration_utils import GenerationMode

# The names under which a model's output returns its cache.
CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
# Cache layers of transformers that never change a tensor in place: an update makes new tensors.
_COPY_ON_WRITE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")

# Attributes of a model's modules that hold the state of a text, with their values.
ModuleState: TypeAlias = dict[tuple[torch.nn.Module, str], Any]


class GenerationModel:
    """A transformers model and how its generation steps are called in the installed version of transformers.

    Attributes:
        module_state: the state attributes of the model's modules with the values that a new text begins with. Most
            models have none; RecurrentGemma keeps all of its cache there.
    """

    def __init__(self, model: Any, context: int) -> None:
        """
        Args:
            model: a transformers model that generates, in eval mode.
            context: longest text in tokens.
        """
        self.model = model
        self.context = context
        self.module_state: ModuleState = {}
        forward = inspect.signature(model.forward).parameters
        prepare = inspect.signature(type(model).prepare_inputs_for_generation).parameters
        self.has_logits_to_keep = "logits_to_keep" in forward
        self.has_attention_mask = "attention_mask" in forward or "attention_mask" in prepare
        # transformers 5 slices the ids by the length of the next sequence, transformers 4 by positions in the cache.
        # A model with a method of its own may take either through its keyword arguments.
        self.slices_by_length = hasattr(model, "_prefill")
        self._config = copy.deepcopy(model.generation_config)
        self._config.cache_implementation = None
        self._config.use_cache = True
        self._before = self._module_values()

    def new_cache(self) -> dict[str, Any]:
        """Arguments of the first step, with an empty cache if the model does not make its own."""
        arguments: dict[str, Any] = {"use_cache": True}
        self.model._prepare_cache_for_generation(self._config, arguments, GenerationMode.SAMPLE, 1, self.context)
        return arguments

    def find_module_state(self) -> None:
        """Find the attributes that forwards have changed since construction. Call after the first forwards."""
        before, self._before = self._before, {}
        for key, value in self._module_values().items():
            if value is not before.get(key):
                self.module_state[key] = before.get(key)

    def save_module_state(self) -> ModuleState:
        """The present values of the state attributes."""
        return {(module, name): getattr(module, name) for module, name in self.module_state}

    def load_module_state(self, state: ModuleState) -> None:
        """Set the state attributes."""
        for (module, name), value in state.items():
            setattr(module, name, value)

    def _module_values(self) -> ModuleState:
        """All plain attributes of the model's modules that are tensors or None."""
        return {
            (module, name): value
            for module in self.model.modules()
            for name, value in vars(module).items()
            if value is None or isinstance(value, torch.Tensor)
        }


class CacheSnapshot(NamedTuple):
    """A state to which a `GenerationState` can return."""

    arguments: dict[str, Any]
    length: int
    module_state: ModuleState


class GenerationState:
    """The tokens of one text that a model has read, and its cache of them."""

    def __init__(self, model: GenerationModel) -> None:
        self._model = model
        self._arguments = model.new_cache()
        self._tokens = torch.empty((1, 0), dtype=torch.int64, device=model.model.device)
        self.module_state: ModuleState = dict(model.module_state)

    @property
    def length(self) -> int:
        """Number of tokens read."""
        return int(self._tokens.shape[1])

    def feed(self, ids: list[int], rows: int = 1) -> torch.Tensor:
        """Read `ids` in one forward, as one step of transformers' `generate` does.

        Args:
            rows: how many rows of logits to return.

        Returns (rows, V) float32 logits after the last `rows` of `ids`.
        """
        wrapped, model = self._model, self._model.model
        wrapped.load_module_state(self.module_state)
        past = self.length
        if not past and len(ids) == 1 and self.module_state and hasattr(model.model, "_setup_cache"):
            # RecurrentGemma resets its state only before a text of several tokens.
            model.model._setup_cache(model.config, 1, model.device, model.dtype)
        new = torch.tensor([ids], device=self._tokens.device)
        tokens = torch.cat([self._tokens, new], dim=1)
        arguments = dict(self._arguments)
        if wrapped.has_attention_mask:
            arguments["attention_mask"] = torch.ones_like(tokens)
        if wrapped.has_logits_to_keep:
            arguments["logits_to_keep"] = rows
        if wrapped.slices_by_length:
            arguments["position_ids"] = model._prepare_position_ids_for_generation(tokens, arguments)
            has_cache = any(arguments.get(name) is not None for name in CACHE_NAMES)
            inputs = model.prepare_inputs_for_generation(
                tokens,
                next_sequence_length=len(ids) if past and has_cache else None,
                is_first_iteration=not past,
                **arguments,
            )
        else:
            arguments["cache_position"] = torch.arange(past, past + len(ids), device=tokens.device)
            inputs = model.prepare_inputs_for_generation(tokens, **arguments)
        output = model(**inputs, return_dict=True)
        kept = model._update_model_kwargs_for_generation(output, arguments)
        self._arguments = {name: kept[name] for name in ("use_cache", *CACHE_NAMES) if name in kept}
        self._tokens = tokens
        self.module_state = wrapped.save_module_state()
        logits: torch.Tensor = output.logits[0, -rows:].float()
        return logits

    @property
    def can_crop(self) -> bool:
        """Whether the cache is plain keys and values of all tokens, so that `crop` can drop the last ones."""
        caches = [value for name, value in self._arguments.items() if name != "use_cache" and value is not None]
        return not self.module_state and all(
            type(cache).__name__ == "DynamicCache"
            and cache.layers
            and all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
            for cache in caches
        )

    def crop(self, length: int) -> None:
        """Drop all tokens after the first `length`. Only if `can_crop`."""
        if length < self.length:
            for name in CACHE_NAMES:
                if self._arguments.get(name) is not None:
                    # A negative argument is the number of tokens to drop, in all versions of transformers.
                    self._arguments[name].crop(length - self.length)
            self._tokens = self._tokens[:, :length]

    def fork(self, length: int) -> GenerationState:
        """A state of its own that has read the first `length` tokens; fewer than all of them only if `can_crop`."""
        other = GenerationState(self._model)
        other._tokens = self._tokens
        other._arguments, other.module_state = _copy(self._arguments), _copy(self.module_state)
        other.crop(length)
        return other

    def snapshot(self) -> CacheSnapshot:
        """A state for `restore`."""
        return CacheSnapshot(_copy(self._arguments), self.length, _copy(self.module_state))

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Return to `snapshot`, which remains valid."""
        self._arguments, self.module_state = _copy(snapshot.arguments), _copy(snapshot.module_state)
        self._tokens = self._tokens[:, : snapshot.length]

    @property
    def nbytes(self) -> int:
        """Memory of the cache in bytes."""
        storages: dict[int, int] = {}
        for tensor in _tensors((self._arguments, list(self.module_state.values()))):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def _copy(value: Any) -> Any:
    """A copy of a cache that further forwards do not change."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, dict):
        # Of the same class: some caches are dictionaries with defaults.
        duplicate = copy.copy(value)
        for key, item in value.items():
            duplicate[key] = _copy(item)
        return duplicate
    if not _is_cache_object(value):
        return value
    duplicate = copy.copy(value)
    if type(value).__name__ not in _COPY_ON_WRITE_LAYERS:
        duplicate.__dict__ = _copy(vars(value))
    return duplicate


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a cache."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        items: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from _tensors(item)
    elif _is_cache_object(value):
        yield from _tensors(vars(value))


def _is_cache_object(value: Any) -> bool:
    """Whether `value` is a cache, a layer of one or another holder of states, whose attributes belong to the text."""
    if not hasattr(value, "__dict__") or isinstance(value, type | torch.nn.Module):
        return False
    return any("cache" in base.__name__.lower() for base in type(value).__mro__)
