"""The processes of a training on several GPUs, as torchrun starts them; by default there is only this one.

Every process has the whole draft. The parts of a batch (`TrainingSchedule.accumulate`) are divided among them, so that
a training on several GPUs takes the same steps as one on a single GPU, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from edge_runtime.protocol.errors import InputError


@dataclass(frozen=True)
class TrainingGroup:
    """This process among those of a training.

    Attributes:
        rank: of this process; the first, 0, alone reports, evaluates and writes files.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> TrainingGroup:
        """Connect with the processes that torchrun has started; alone, if it has not started this one.

        Args:
            device: where this process trains.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def writes_backwards(self) -> bool:
        """Whether this process writes the last chats first, and so meets the one that writes the first ones first."""
        return self.rank % 2 == 1

    def own_parts(self, parts: int) -> range:
        """Return which parts of a batch this process takes.

        Raises:
            InputError: the parts cannot be divided equally.
        """
        if parts % self.size:
            raise InputError(f"{parts} parts of a batch cannot be divided among {self.size} processes: --accumulate")
        return range(self.rank, parts, self.size)

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def share(self, value: float, device: torch.device) -> float:
        """Return the first process's `value`."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(shared, 0)
        return float(shared)

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first process run the block before the others do."""
        if self.size > 1 and not self.is_first:
            distributed.barrier()
        yield
        if self.size > 1 and self.is_first:
            distributed.barrier()


ALONE = TrainingGroup()


def worker_device(name: str | None) -> torch.device:
    """Return the device to train on: `name`, or a GPU of its own for each process, or the CPU."""
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
