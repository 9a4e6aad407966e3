"""What a draft shares with its target, described by data, and how a draft model is put together from a target.

A draft is an ordinary CausalLM of the target's own class with fewer blocks. Each of its blocks is either one of the
target's, bit for bit and frozen for good, or a new one that starts as a copy of a target block and is then trained.

    anchor      new blocks, then the target's last blocks (or none of them), its norm, head and embedding
    prefix      the target's embedding and first blocks, then new blocks, norm and head
    standalone  all new: the control that a shared draft must beat
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edge_runtime.protocol.bundle import SharedTensors, fingerprint, shared_names
from edge_runtime.protocol.errors import InputError

# Model types whose tensors are named alike: `model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`.
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
# Lists in a configuration that hold one entry per block.
PER_BLOCK_SETTINGS = ("layer_types",)
BLOCK_NAME = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """How a draft's blocks are laid out: which side the target's own blocks are on, if any are shared."""

    name: str
    shares: bool
    shared_last: bool


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("anchor", shares=True, shared_last=True),
        Layout("prefix", shares=True, shared_last=False),
        Layout("standalone", shares=False, shared_last=False),
    )
}


@dataclass(frozen=True)
class DraftPlan:
    """A layout applied to a target of a certain depth.

    Attributes:
        layout: one of `LAYOUTS`.
        new_blocks: blocks that are trained.
        shared_blocks: blocks that are the target's own.
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
        # Without a block of the target's, an anchor draft still shares norm, head and embedding.
        least = 0 if LAYOUTS[self.layout].shared_last else 1
        if self.new_blocks < 1:
            raise InputError(f"a draft needs at least one new block, not {self.new_blocks}")
        if shares and not least <= self.shared_blocks < self.target_blocks:
            raise InputError(
                f"layout {self.layout} of a target with {self.target_blocks} blocks shares {least} to "
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
        """For each block of the draft, the target block that it is, or starts as a copy of.

        New blocks start as target blocks spread evenly over those that are not shared: skipping inner blocks of a
        trained network costs least.
        """
        total, shared = self.target_blocks, self.shared_blocks
        if LAYOUTS[self.layout].shared_last:
            return (*_spread(0, total - shared - 1, self.new_blocks), *range(total - shared, total))
        return (*range(shared), *_spread(shared, total - 1, self.new_blocks))

    @property
    def shared_range(self) -> range:
        """Which blocks of the draft are the target's own."""
        if LAYOUTS[self.layout].shared_last:
            return range(self.new_blocks, self.blocks)
        return range(self.shared_blocks)

    def shared_tensors(self, target_names: Iterable[str]) -> dict[str, str]:
        """Frozen tensors, as draft name -> target name.

        Args:
            target_names: names in the target's checkpoint or state dict.
        """
        place = {self.origins[index]: index for index in self.shared_range}
        names = shared_names(self.layout, self.shared_blocks, self.target_blocks, list(target_names))
        return {_renumber(name, place): name for name in names}

    def origin_of(self, draft_name: str) -> str:
        """The target tensor that a draft tensor is, or starts as a copy of."""
        return _renumber(draft_name, dict(enumerate(self.origins)))


def plan_draft(
    config: PretrainedConfig, layout: str = "anchor", *, new_blocks: int = 2, shared_blocks: int = 1
) -> DraftPlan:
    """The plan of a draft for a target with this configuration.

    Args:
        shared_blocks: ignored by layouts that share nothing.

    Raises:
        InputError: the architecture is not one of `FAMILIES`, or the numbers make no draft.
    """
    if config.model_type not in FAMILIES:
        raise InputError(
            f"cannot lay out a draft for model type {config.model_type!r}: known are {', '.join(FAMILIES)}"
        )
    shares = LAYOUTS[layout].shares if layout in LAYOUTS else True
    return DraftPlan(layout, new_blocks, shared_blocks if shares else 0, config.num_hidden_layers)


def draft_config(config: PretrainedConfig, plan: DraftPlan) -> PretrainedConfig:
    """The target's configuration with the draft's blocks."""
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
    """An untrained draft of `target`, on its device and in its dtype; shared parameters need no gradient."""
    plan = plan_draft(target.config, layout, new_blocks=new_blocks, shared_blocks=shared_blocks)
    draft = AutoModelForCausalLM.from_config(draft_config(target.config, plan), dtype=target.dtype)
    source = target.state_dict()
    draft.load_state_dict({name: source[plan.origin_of(name)] for name in draft.state_dict()})
    draft.generation_config = copy.deepcopy(target.generation_config)
    freeze_shared(draft, plan)
    return draft.to(target.device), plan


def freeze_shared(draft: PreTrainedModel, plan: DraftPlan) -> None:
    """Takes the shared parameters out of training."""
    shared = plan.shared_tensors({plan.origin_of(name) for name in parameter_names(draft)})
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name not in shared)


def parameter_names(model: torch.nn.Module) -> list[str]:
    """Names of a model's distinct parameters: a head tied to the embedding is not listed twice."""
    return [name for name, _ in model.named_parameters()]


def describe_shared(tensors: Mapping[str, torch.Tensor], plan: DraftPlan) -> SharedTensors:
    """What a bundle records of the shared tensors, and what their identity follows from.

    Args:
        tensors: the shared tensors by their names in the target.
    """
    prints = {name: fingerprint(tensors[name].float().cpu().numpy()) for name in sorted(tensors)}
    return SharedTensors(plan.layout, plan.shared_blocks, prints)


def _spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` whole numbers from `first` to `last`, evenly spaced; a single one is `first`."""
    return tuple(first + round(index * (last - first) / max(1, count - 1)) for index in range(count))


def _renumber(name: str, blocks: Mapping[int, int]) -> str:
    """The tensor's name with its block number replaced."""
    return BLOCK_NAME.sub(lambda match: f"model.layers.{blocks[int(match[1])]}.", name)
