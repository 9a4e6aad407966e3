"""Draft layouts: which tensors a draft model shares with its target, and how a draft is built from a target.

A draft is a causal language model of the target's own class with fewer blocks. Each of its blocks is either a frozen,
bit-exact block of the target, or a new block that is initialized as a copy of a target block and then trained.

    anchor      new blocks, then the target's last blocks (possibly none), its norm, head and embedding
    prefix      the target's embedding and first blocks, then new blocks, norm and head
    standalone  all new: the control that a shared draft must beat
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edge_runtime.protocol.bundle import SharedTensors, fingerprint_tensor, shared_tensor_names
from edge_runtime.protocol.errors import InputError

# Model types with the same tensor names: `model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`.
SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
# Configuration entries that are lists with one element per block.
PER_BLOCK_SETTINGS = ("layer_types",)
BLOCK_NAME_PATTERN = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """A kind of draft.

    Attributes:
        shares: the draft shares tensors with its target.
        shared_last: shared blocks are the last blocks, not the first.
    """

    shares: bool
    shared_last: bool


LAYOUTS: Mapping[str, Layout] = {
    "anchor": Layout(shares=True, shared_last=True),
    "prefix": Layout(shares=True, shared_last=False),
    "standalone": Layout(shares=False, shared_last=False),
}


@dataclass(frozen=True)
class DraftPlan:
    """A layout applied to a target of a given depth; stored as `plan` in `draft.json`.

    Attributes:
        layout: one of `LAYOUTS`.
        new_blocks: number of trained blocks.
        shared_blocks: number of blocks shared with the target.
        target_blocks: depth of the target.
    """

    layout: str
    new_blocks: int
    shared_blocks: int
    target_blocks: int

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"no draft layout {self.layout!r}: choose one of {', '.join(LAYOUTS)}")
        shares = LAYOUTS[self.layout].shares
        # An anchor draft without shared blocks still shares norm, head and embedding.
        fewest_shared = 0 if LAYOUTS[self.layout].shared_last else 1
        if self.new_blocks < 1:
            raise InputError(f"a draft needs at least one new block, not {self.new_blocks}")
        if shares and not fewest_shared <= self.shared_blocks < self.target_blocks:
            raise InputError(
                f"layout {self.layout} of a target with {self.target_blocks} blocks shares {fewest_shared} to "
                f"{self.target_blocks - 1} of them, not {self.shared_blocks}"
            )
        if not shares and self.shared_blocks:
            raise InputError(f"layout {self.layout} shares nothing: ask for 0 shared blocks")

    @property
    def blocks(self) -> int:
        """Depth of the draft."""
        return self.new_blocks + self.shared_blocks

    @property
    def origins(self) -> tuple[int, ...]:
        """For each block of the draft: the target block that it shares, or is initialized from.

        New blocks are initialized from target blocks spread evenly over those that are not shared: skipping inner
        blocks of a trained network costs least.
        """
        total, shared = self.target_blocks, self.shared_blocks
        if LAYOUTS[self.layout].shared_last:
            return (*_spread(0, total - shared - 1, self.new_blocks), *range(total - shared, total))
        return (*range(shared), *_spread(shared, total - 1, self.new_blocks))

    @property
    def shared_range(self) -> range:
        """Indices of the draft's blocks that are shared."""
        if LAYOUTS[self.layout].shared_last:
            return range(self.new_blocks, self.blocks)
        return range(self.shared_blocks)

    def shared_tensors(self, target_names: Iterable[str]) -> dict[str, str]:
        """Shared (frozen) tensors, as draft name -> target name.

        Args:
            target_names: tensor names of the target's checkpoint or state dict.
        """
        draft_blocks = {self.origins[index]: index for index in self.shared_range}
        names = shared_tensor_names(self.layout, self.shared_blocks, self.target_blocks, list(target_names))
        return {_renumber_block(name, draft_blocks): name for name in names}

    def origin_of(self, draft_name: str) -> str:
        """The target tensor that a draft tensor shares, or is initialized from."""
        return _renumber_block(draft_name, dict(enumerate(self.origins)))


def plan_draft(
    config: PretrainedConfig, layout: str = "anchor", *, new_blocks: int = 2, shared_blocks: int = 1
) -> DraftPlan:
    """Plan a draft for a target with this configuration.

    Args:
        shared_blocks: ignored by layouts that share nothing.

    Raises:
        InputError: the architecture is not one of `SUPPORTED_MODEL_TYPES`, or the numbers of blocks are impossible.
    """
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise InputError(
            f"cannot lay out a draft for model type {config.model_type!r}: known are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    shares = LAYOUTS[layout].shares if layout in LAYOUTS else True
    return DraftPlan(layout, new_blocks, shared_blocks if shares else 0, config.num_hidden_layers)


def draft_config(config: PretrainedConfig, plan: DraftPlan) -> PretrainedConfig:
    """The configuration of the draft: the target's, with the draft's blocks."""
    draft = copy.deepcopy(config)
    for name in PER_BLOCK_SETTINGS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(draft, name, [values[origin] for origin in plan.origins])
    draft.num_hidden_layers = plan.blocks
    return draft


def build_draft(
    target: PreTrainedModel, layout: str = "anchor", *, new_blocks: int = 2, shared_blocks: int = 1
) -> tuple[PreTrainedModel, DraftPlan]:
    """Build an untrained draft of `target`, on its device and in its dtype. Shared parameters are frozen."""
    plan = plan_draft(target.config, layout, new_blocks=new_blocks, shared_blocks=shared_blocks)
    auto_model: Any = AutoModelForCausalLM  # transformers annotates few of the methods used below.
    draft = auto_model.from_config(draft_config(target.config, plan), dtype=target.dtype)
    source = target.state_dict()
    draft.load_state_dict({name: source[plan.origin_of(name)] for name in draft.state_dict()})
    draft.generation_config = copy.deepcopy(target.generation_config)
    freeze_shared(draft, plan)
    return draft.to(target.device), plan


def add_blocks(draft: PreTrainedModel, plan: DraftPlan, count: int) -> DraftPlan:
    """Add new blocks behind the last new one of a draft, in place, and return its new plan.

    They add nothing to the residual stream until they are trained, so that the draft stays the same function.
    """
    layers: Any = draft.base_model.layers
    last = plan.new_blocks - 1 if LAYOUTS[plan.layout].shared_last else plan.blocks - 1
    for _ in range(count):
        block = copy.deepcopy(layers[last])
        with torch.no_grad():
            for output in (block.self_attn.o_proj, block.mlp.down_proj):
                for parameter in output.parameters():
                    parameter.zero_()
        layers.insert(last + 1, block)
    for index, block in enumerate(layers):
        block.self_attn.layer_idx = index
    config: Any = draft.config
    config.num_hidden_layers = len(layers)
    for name in PER_BLOCK_SETTINGS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [*values[: last + 1], *[values[last]] * count, *values[last + 1 :]])
    return replace(plan, new_blocks=plan.new_blocks + count)


def freeze_shared(draft: PreTrainedModel, plan: DraftPlan) -> None:
    """Exclude the shared parameters from training."""
    shared = plan.shared_tensors({plan.origin_of(name) for name in parameter_names(draft)})
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name not in shared)


def parameter_names(model: torch.nn.Module) -> list[str]:
    """Names of the distinct parameters of a model: a head tied to the embedding is listed once."""
    return [name for name, _ in model.named_parameters()]


def fingerprint_shared(tensors: Mapping[str, torch.Tensor], plan: DraftPlan) -> SharedTensors:
    """The record of the shared tensors in a bundle, from which their identity follows.

    Args:
        tensors: the shared tensors by their names in the target.
    """
    fingerprints = {name: fingerprint_tensor(tensors[name].float().cpu().numpy()) for name in sorted(tensors)}
    return SharedTensors(plan.layout, plan.shared_blocks, fingerprints)


def _spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced integers from `first` to `last`; a single one is `first`."""
    return tuple(first + round(index * (last - first) / max(1, count - 1)) for index in range(count))


def _renumber_block(name: str, blocks: Mapping[int, int]) -> str:
    """The tensor's name with its block number mapped by `blocks`."""
    return BLOCK_NAME_PATTERN.sub(lambda match: f"model.layers.{blocks[int(match[1])]}.", name)
