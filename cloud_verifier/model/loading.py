"""How this process loads its targets: on which device, in which type, by itself or as one of a team."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from cloud_verifier.model.kv_cache import Pool
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import InputError, TargetError


class Loading(msgspec.Struct, frozen=True):
    """The same for every target.

    Attributes:
        device: a torch device.
        dtype: name of the type to compute in.
        context: longest text to serve; None for what each model was trained for.
        threads: of torch on a CPU; 0 leaves that to torch.
        exact, compiled: on CUDA, see `graphs.GraphRunner`.
    """

    device: str = "cpu"
    dtype: str = "float32"
    context: int | None = None
    threads: int = 0
    exact: bool = False
    compiled: bool = False

    def check(self) -> None:
        """Raises InputError where the machine cannot do that."""
        cuda = torch.device(self.device).type == "cuda"
        if cuda and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here; install torch with CUDA, or use --device cpu")
        if not cuda and (self.exact or self.compiled):
            raise InputError("--exact and --compile are for --device cuda; on a CPU neither is needed")
        if self.is_team and not cuda:
            raise InputError("torchrun is for several GPUs: give --device cuda")

    @property
    def is_team(self) -> bool:
        """Whether torchrun has started this process as one of several."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    def alone(self, path: Path) -> Target:
        """The one target of this process, or its shard of it. Raises TargetError."""
        return self._target(path, "", None)

    def beside(self, path: Path, name: str, others: Sequence[Target]) -> Target:
        """One more target, which shares what memory it can with the others. Raises TargetError."""
        return self._target(path, name, others)

    def follow(self, path: Path, tokens: int) -> None:
        """Does as the team's leader does, until it ends.

        Args:
            tokens: of all texts together, as the leader has them.
        """
        target = self.alone(path)
        target.runner.follow(Pool(target.runner.shape, tokens))

    def _target(self, path: Path, name: str, others: Sequence[Target] | None) -> Target:
        team = None
        if self.is_team:
            from cloud_verifier.model.tensor_parallel import team_of_process

            if others is not None:
                raise TargetError("a registry's versions cannot be split over several GPUs yet; serve one target")
            team = team_of_process()
        if self.threads:
            torch.set_num_threads(self.threads)
        return Target(
            path,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            context=self.context,
            name=name,
            exact=self.exact,
            compiled=self.compiled,
            beside=others,
            team=team,
        )
