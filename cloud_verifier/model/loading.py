"""How this process loads its targets: device, dtype, alone or as one process of a tensor-parallel group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from cloud_verifier.model.converted_checkpoints import cache_directory, resolve_checkpoint
from cloud_verifier.model.kv_cache import KVCachePool
from cloud_verifier.model.layer_compilation import keep_compiled_code
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import InputError, TargetError

# NVIDIA's compute capability from which on GPUs convert 8-bit floating point.
FP8_CAPABILITY = (8, 9)


class TargetLoader(msgspec.Struct, frozen=True, kw_only=True):
    """Loads targets, all with the same options. A target may be a GGUF file, which is converted first.

    Attributes:
        device: a torch device.
        dtype: name of the torch dtype to compute in.
        context: longest text to serve, in tokens; None for the length that each model was trained for.
        threads: torch's CPU threads; 0 leaves the number to torch.
        name: of a single target; empty for that of its directory.
        quantize, cache_format: see `Target`; of a single target.
        exact, compiled: on CUDA, see `cuda_graphs.GraphRunner`; None compiles on CUDA, without a group.
    """

    device: str = "cpu"
    dtype: str = "float32"
    context: int | None = None
    threads: int = 0
    name: str = ""
    exact: bool = False
    compiled: bool | None = None
    quantize: str = ""
    cache_format: str = ""

    def validate(self) -> None:
        """Raise InputError if this machine cannot load targets with these options."""
        cuda = torch.device(self.device).type == "cuda"
        if cuda and not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds no GPU; install torch with CUDA, or use --device cpu")
        if not cuda and (self.exact or self.compiled):
            raise InputError("--exact and --compile need --device cuda; a CPU needs neither")
        if self.cache_format and not cuda:
            raise InputError(
                f"--kv-cache-dtype {self.cache_format} needs --device cuda: on a CPU the last bit of a key depends "
                "on the batch, and rounding would make texts depend on it"
            )
        if self.cache_format and torch.cuda.get_device_capability(self.device) < FP8_CAPABILITY:
            raise InputError(f"--kv-cache-dtype {self.cache_format}: this GPU has no such numbers; leave it out")
        if self.is_tensor_parallel and self.quantize:
            raise InputError("--quantize is for one GPU; --gpus and torchrun split a target over several")
        if self.is_tensor_parallel and not cuda:
            raise InputError("torchrun is for several GPUs: give --device cuda")

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether torchrun has started this process as one of several."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    def load_single(self, path: Path) -> Target:
        """Load the only target of this process, or its shard of it. Raises TargetError."""
        return self._load(path, self.name, None)

    def load_version(self, path: Path, name: str, others: Sequence[Target]) -> Target:
        """Load one of several versions, which shares memory with the `others` if possible. Raises TargetError."""
        return self._load(path, name, others)

    def follow_leader(self, path: Path, tokens: int) -> None:
        """Load a shard of the target and run the forwards of the tensor-parallel leader until it shuts down.

        Args:
            tokens: capacity of the KV cache pool, equal to the leader's.
        """
        target = self.load_single(path)
        assert isinstance(target.runner, TargetRunner), "the general tier has no followers"
        target.runner.follow_leader(KVCachePool(target.runner.shape, tokens))

    def _load(self, path: Path, name: str, others: Sequence[Target] | None) -> Target:
        group = None
        if self.is_tensor_parallel:
            from cloud_verifier.model.tensor_parallel import tensor_parallel_group

            if others is not None:
                raise TargetError("a registry's versions cannot be split over several GPUs yet; serve one target")
            group = tensor_parallel_group()
        is_cuda = torch.device(self.device).type == "cuda"
        if is_cuda:
            # Without a place to keep it, code is compiled at every start.
            with contextlib.suppress(TargetError):
                keep_compiled_code(cache_directory(os.environ, "compiled"))
        if self.threads:
            torch.set_num_threads(self.threads)
        directory = resolve_checkpoint(path)
        return Target(
            directory,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            context=self.context,
            name=name or path.stem if directory != path else name,
            quantize=self.quantize,
            cache_format=self.cache_format,
            # In a batch of another size a key may be another number of the cache.
            exact=self.exact or bool(self.cache_format),
            compiled=is_cuda and group is None if self.compiled is None else self.compiled,
            share_with=others,
            group=group,
        )
