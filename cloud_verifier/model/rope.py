"""Rotary embeddings whose frequencies depend on the length of the text, made functions of a row alone.

LongRoPE (Phi-3, Phi-4; arXiv 2402.13753) has one set of frequencies for texts of up to its original context length and
another for longer ones. transformers chooses by the largest position in a forward, which in a batch of several texts is
that of another text. Here each row has the set that its text would have alone in `generate`. Dynamic NTK scaling only
changes its frequencies beyond the longest text that is served.

When a text outgrows the first set, Phi-3 computes all its keys anew (transformers 4.57 does; 5.17 means to, but forgets
the text there), and so does the verifier. Other models continue with keys of both sets: those of the prompt have the
set for its length, and every later row that for its own position.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from cloud_verifier.model.attention import get_forward_context
from cloud_verifier.model.batch import Segment
from edge_runtime.protocol.errors import TargetError

# Types whose `prepare_inputs_for_generation` drops the KV cache when the text outgrows the first set.
RECOMPUTING_MODEL_TYPES = {"phi3", "phi4_multimodal"}
# Positions that the checks of a rotary embedding compare.
CHECKED_POSITIONS = 8


class LengthScaledRope:
    """The rotary embeddings of one model.

    Attributes:
        switch: texts of more tokens than this use the second set of frequencies; None if there is one set.
        recomputes: all rows of a text have the set for its length, and are computed anew when that changes.
    """

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        """Prepare the rotary embeddings of `model`.

        Raises:
            TargetError: the frequencies depend on the length of the text in another way.
        """
        config = model.config
        x = torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device)
        self.switch: int | None = None
        self._modules: dict[Any, _RotaryByLength] = {}
        for module in model.modules():
            if "RotaryEmbedding" not in type(module).__name__:
                continue
            types = _rope_types(module)
            if "longrope" in types.values():
                self.switch = _original_length(config, module)
                sets = [_frozen(module, x, position) for position in (0, self.switch)]
            elif any("dynamic" in str(rope_type) for rope_type in types.values()):
                sets = [_frozen(module, x, 0)]
            else:
                sets = []
            _check(module, sets, x, self.switch, config.max_position_embeddings)
            if sets:
                self._modules[module] = _RotaryByLength(self, module, sets)
        if self.switch and self.switch >= config.max_position_embeddings:
            self.switch = None
        known: int | None = getattr(config, "original_max_position_embeddings", None)
        self.recomputes = config.model_type in RECOMPUTING_MODEL_TYPES and known == self.switch
        for module, forward in self._modules.items():
            module.forward = forward

    @property
    def depends_on_prompt(self) -> bool:
        """Whether the rows of a text depend on where its prompt ended."""
        return self.switch is not None and not self.recomputes

    def is_long(self, length: int) -> bool:
        """Whether a text of `length` tokens uses the second set of frequencies."""
        return self.switch is not None and length > self.switch

    def long_rows(self, segment: Segment) -> list[bool]:
        """Whether each row of a segment uses the second set of frequencies."""
        sequence = segment.sequence
        if self.recomputes:
            return [sequence.long_rope] * len(segment)
        return [self.is_long(max(sequence.prompt_length, position + 1)) for position in segment.positions]

    def remove(self) -> None:
        """Leave the model as transformers made it."""
        for module in self._modules:
            del module.forward


class _RotaryByLength:
    """The forward of a rotary embedding: as transformers made it, but by row in a forward of a runner."""

    def __init__(self, rope: LengthScaledRope, module: Any, sets: list[Any]) -> None:
        self._rope, self._forward, self._sets = rope, module.forward, sets

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = get_forward_context()
        if context is None:
            return self._forward(x, *args, **kwargs)
        short, *rest = (frozen(x, *args, **kwargs) for frozen in self._sets)
        if not rest:
            return short
        is_long = context.long_rope_rows(self._rope.long_rows)[None, :, None]
        if isinstance(short, torch.Tensor):
            return torch.where(is_long, rest[0], short)
        return tuple(torch.where(is_long, *pair) for pair in zip(rest[0], short, strict=True))


def _rope_types(module: Any) -> dict[str | None, str]:
    """The RoPE types of a rotary embedding by layer type; by None if all layers have the same."""
    types = getattr(module, "rope_type", "default")
    return types if isinstance(types, dict) else {None: types}


def _rotate(module: Any, x: torch.Tensor, positions: list[int]) -> list[torch.Tensor]:
    """The results of a rotary embedding for the positions, for all layer types: each (1, positions, size)."""
    results: list[torch.Tensor] = []
    for layer_type in _rope_types(module):
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        result = module(x, torch.tensor([positions], device=x.device), **arguments)
        results += [result] if isinstance(result, torch.Tensor) else result
    return results


def _frozen(module: Any, x: torch.Tensor, position: int) -> Any:
    """A copy of a rotary embedding that keeps the frequencies which it has for a text that ends at `position`."""
    frozen = copy.deepcopy(module)
    _rotate(frozen, x, [position])
    types = _rope_types(frozen)
    frozen.rope_type = "default" if None in types else dict.fromkeys(types, "default")
    return frozen


def _original_length(config: Any, module: Any) -> int:
    """The length from which on longrope uses its second set, as transformers' `dynamic_rope_update` finds it."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        length: int = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    else:
        if None not in _rope_types(module):
            parameters = next(value for value in parameters.values() if value["rope_type"] == "longrope")
        length = parameters["original_max_position_embeddings"]
    return length


def _check(module: Any, sets: list[Any], x: torch.Tensor, switch: int | None, context: int) -> None:
    """Check that a rotary embedding is a function of the position, with `sets` or else as it is.

    Raises:
        TargetError: it is not.
    """
    first = list(range(min(CHECKED_POSITIONS, context)))
    # The first and the last length of each set.
    borders = [] if switch is None or switch >= context else [switch, switch + 1]
    for length in (len(first), *borders, context):
        positions = [*first, length - 1]
        used = sets[switch is not None and length > switch] if sets else copy.deepcopy(module)
        try:
            expected = _rotate(copy.deepcopy(module), x, positions)
            pairs = zip(_rotate(used, x, first) + _rotate(used, x, positions), expected * 2, strict=True)
        except (TypeError, IndexError, ValueError):
            # Not called with positions alone; the self-test shows whether it works.
            return
        if not all(torch.allclose(actual, correct[:, : actual.shape[1]], atol=1e-6) for actual, correct in pairs):
            raise TargetError(f"{type(module).__name__} depends on the length of the text in an unknown way")
