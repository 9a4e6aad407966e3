"""A target over several GPUs of one machine: torch's DTensor splits it, and one process leads the others.

Every process holds a shard of the weights, and the keys and values of its heads. The leader serves; for each forward it
sends the others the plan, a few integers, and all replay the same graph, in which the products' halves are summed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from edge_runtime.protocol.errors import TargetError

WAYS = ("end", "replay", "forward")
# A verifier may be idle for long, and its followers wait.
PATIENCE = timedelta(days=365)


@functools.cache
def team_of_process() -> Team:
    """The one team that a process can be in."""
    return Team()


class Told(NamedTuple):
    """What the leader does now."""

    way: str
    rows: int


class Team:
    """The processes that torchrun has started, each with a GPU of its own.

    Attributes:
        rank: of this process; 0 leads.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.cuda.set_device(self.rank)
        distributed.init_process_group("nccl", timeout=PATIENCE, device_id=torch.device("cuda", self.rank))
        self._header = torch.zeros(2, dtype=torch.int64, device="cuda")

    def split(self, model: Any) -> None:
        """Leaves this process's shard of `model`, by the plan that comes with its architecture.

        Raises:
            TargetError: it has none, or its heads do not divide.
        """
        config = model.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        plan = getattr(config, "base_model_tp_plan", None)
        if not plan or any(count % self.size for count in heads):
            raise TargetError(f"{config.model_type} with {heads} heads cannot be split over {self.size} GPUs")
        styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
        base = model.base_model_prefix
        try:
            # Every process has the whole embedding: it is looked up, not multiplied.
            split: dict[str, Any] = {
                f"{base}.{name}": styles[style]() for name, style in plan.items() if not style.startswith("embedding")
            }
        except KeyError as error:
            raise TargetError(f"{config.model_type} is split in a way that is not known here: {error}") from None
        if not config.tie_word_embeddings:
            split["lm_head"] = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, init_device_mesh("cuda", (self.size,)), split)

    def lead(self, way: str, rows: int, plan: torch.Tensor) -> None:
        """Sends what is to be done, and the plan of it."""
        self._header.copy_(torch.tensor([WAYS.index(way), rows]))
        distributed.broadcast(self._header, 0)
        distributed.broadcast(plan, 0)

    def end(self) -> None:
        """Lets the others go."""
        self._header.zero_()
        distributed.broadcast(self._header, 0)

    def follow(self, plan_of: Callable[[int], torch.Tensor]) -> Told | None:
        """Waits for the leader; what it does, its plan received. None at the end."""
        distributed.broadcast(self._header, 0)
        way, rows = self._header.tolist()
        if not way:
            return None
        distributed.broadcast(plan_of(rows), 0)
        return Told(WAYS[way], rows)
