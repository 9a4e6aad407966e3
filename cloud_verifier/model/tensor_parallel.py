"""Tensor parallelism over several GPUs of one machine: torch's DTensor shards the model, and one process leads.

Every process holds a shard of the weights, and the keys and values of its heads. The leader serves requests. For each
forward it broadcasts the inputs, a few integers, and all processes replay the same CUDA graph, in which the partial
products are all-reduced.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from edge_runtime.protocol.errors import TargetError

# How a forward is run; each is the name of a method of `cuda_graphs.GraphRunner`.
ForwardMode = Literal["replay", "forward"]
# A command is sent as 1 + its index here; 0 stops the followers.
FORWARD_MODES: tuple[ForwardMode, ...] = ("replay", "forward")
# Chosen to exceed any idle time of a verifier: followers block in a collective until the next forward.
COLLECTIVE_TIMEOUT = timedelta(days=365)


@functools.cache
def tensor_parallel_group() -> TensorParallelGroup:
    """The group of this process; a process can be in only one."""
    return TensorParallelGroup()


class LeaderCommand(NamedTuple):
    """A forward that the leader runs and that the followers must run too."""

    mode: ForwardMode
    rows: int


class TensorParallelGroup:
    """The processes that torchrun has started, each with a GPU of its own.

    Attributes:
        rank: of this process; 0 is the leader.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.cuda.set_device(self.rank)
        distributed.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=torch.device("cuda", self.rank))
        self._header = torch.zeros(2, dtype=torch.int64, device="cuda")

    def shard_model(self, model: Any) -> None:
        """Replace the weights of `model` by this process's shard, by the plan that comes with its architecture.

        Raises:
            TargetError: the architecture has no plan, or its heads do not divide by the number of GPUs.
        """
        config = model.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        plan = getattr(config, "base_model_tp_plan", None)
        if not plan or any(count % self.size for count in heads):
            raise TargetError(f"{config.model_type} with {heads} heads cannot be split over {self.size} GPUs")
        styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
        base = model.base_model_prefix
        try:
            # Every process keeps the whole embedding: it is looked up, not multiplied.
            parallel_plan: dict[str, Any] = {
                f"{base}.{name}": styles[style]() for name, style in plan.items() if not style.startswith("embedding")
            }
        except KeyError as error:
            raise TargetError(
                f"the tensor-parallel plan of {config.model_type} has the unknown style {error}"
            ) from None
        if not config.tie_word_embeddings:
            parallel_plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, init_device_mesh("cuda", (self.size,)), parallel_plan)

    def send(self, mode: ForwardMode, rows: int, inputs: torch.Tensor) -> None:
        """Broadcast a forward and its inputs from the leader to the followers."""
        self._header.copy_(torch.tensor([1 + FORWARD_MODES.index(mode), rows]))
        distributed.broadcast(self._header, 0)
        distributed.broadcast(inputs, 0)

    def stop_followers(self) -> None:
        """Make `receive` return None in every follower."""
        self._header.zero_()
        distributed.broadcast(self._header, 0)

    def receive(self, inputs_buffer: Callable[[int], torch.Tensor]) -> LeaderCommand | None:
        """Wait for the next forward of the leader and receive its inputs; None if the leader has stopped.

        Args:
            inputs_buffer: the tensor that receives the inputs, by number of rows.
        """
        distributed.broadcast(self._header, 0)
        command, rows = self._header.tolist()
        if not command:
            return None
        distributed.broadcast(inputs_buffer(rows), 0)
        return LeaderCommand(FORWARD_MODES[command - 1], rows)
