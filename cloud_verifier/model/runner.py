"""The model runner: one forward over segments of many sequences, and the tokens sampled after their rows.

On a CPU a forward has the rows of its segments, and at least `min_rows`. For CUDA see `cuda_graphs`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from cloud_verifier.model.attention import set_forward_context
from cloud_verifier.model.batch import ForwardBatch, Segment, do_nothing
from cloud_verifier.model.fast_tier import PagedAttention, forward_arguments
from cloud_verifier.model.kv_cache import KVCachePool
from cloud_verifier.model.lora import LoRAAdapters
from cloud_verifier.model.sampling import LazySampledTokens, SampledTokens
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import CoupledSampler


class PendingPrefill(NamedTuple):
    """Token ids to prefill into the cache of a session, in chunks as the scheduler has room."""

    ids: list[int]


# What a round needs run next; None yields to other rounds.
RoundWork: TypeAlias = PendingPrefill | Segment | None


class TargetRunner:
    """Runs one model and its LoRA adapters. Several threads may use it, each with its own pool.

    Attributes:
        rope: the rotary embeddings of the model.
        shape: KV cache shape of the pools that it runs with.
        adapters: the LoRA adapters of the model.
        max_rows, max_segments: limits of one forward.
        max_round_rows: most rows of several rounds, all of which are sampled, in one forward.
        min_rows: rows to which a forward on a CPU is padded, see `cpu_layers`.
        max_prefill_rows: rows of one forward that the scheduler should use for prefill, so that rounds in the same
            forward do not wait long.
        runs_ahead: it uses the hint `continues` of `run`.
        exact: the result of a row does not depend on the batch composition, not even in the last bit. Siblings must not
            be scored then.
    """

    max_rows = max_round_rows = 256
    min_rows = 1
    max_segments = 1 << 16
    max_prefill_rows = 128
    runs_ahead = False
    exact = False

    def __init__(self, model: Any, attention: PagedAttention) -> None:
        """
        Args:
            model: a transformers causal language model.
            attention: its attention layers, prepared for the paged KV cache.
        """
        self.model = model
        self.shape = attention.shape
        self.rope = attention.rope
        self._selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.adapters = LoRAAdapters(model)
        self._sampler = CoupledSampler(model.config.vocab_size)

    def run(
        self,
        pool: KVCachePool,
        segments: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        """Run one forward and sample after every row of each segment; None for segments without `sampling`.

        Keys and values of all rows are written after their sequences; `KVCachePool.keep` decides which stay.

        Args:
            meanwhile: called once an accelerator computes, or before a CPU does; perhaps not, if there is an error.
            continues: the token after each segment is going to be the next segment of its sequence, unless the text
                ends; then an accelerator need not wait for the host in between, see `forward_ahead`. A hint: the next
                call may have other segments.

        Raises:
            KVCacheFull: nothing was run.
        """
        meanwhile()
        logits = iter(self.logits(pool, segments))
        return [
            LazySampledTokens(next(logits), segment.sampling, self._sampler) if segment.sampling else None
            for segment in segments
        ]

    def warm_up(self, pool: KVCachePool) -> None:
        """Do in advance what would delay the first forwards."""

    def measure_workspace(self) -> int:
        """Bytes that forwards take beside the weights and the pool, where a pool is to use all memory that is left."""
        return 0

    def round_cache(self, dtype: torch.dtype) -> None:
        """Round keys and values to `dtype` from now on, in pools that are made later. CUDA only; see `cuda_graphs`."""
        raise TargetError("only a GPU has a KV cache in another dtype than the model's")

    def simplify(self) -> bool:
        """Give up one of the changes that make the model's layers faster; return whether there was one."""
        return False

    def follow_leader(self, pool: KVCachePool) -> None:
        """Run the forwards of the tensor-parallel leader until it shuts down. CUDA only; see `cuda_graphs`."""
        raise NotImplementedError

    def shut_down(self) -> None:
        """Release the followers of a tensor-parallel group."""

    @torch.inference_mode()
    def logits(self, pool: KVCachePool, segments: Sequence[Segment]) -> tuple[torch.Tensor, ...]:
        """Run one forward; return (rows, V) float32 logits of every segment that has `sampling`.

        Raises:
            KVCacheFull: nothing was run.
        """
        pool.apply_moves()
        for segment in segments:
            pool.reserve(segment.sequence, segment.sequence.length + len(segment))
        batch = ForwardBatch.from_segments(pool, list(segments), self.min_rows)
        if any(segment.adapter_slot for segment in segments):
            slots = [segment.adapter_slot for segment in segments for _ in segment.ids]
            batch.lora_mask = self.adapters.row_mask(torch.tensor(_padded(slots, self.min_rows)))
        sampled = [index for index, segment in enumerate(segments) if segment.sampling]
        rows = [row for i in sampled for row in range(batch.starts[i], batch.starts[i] + len(segments[i]))]
        ids = list(itertools.chain.from_iterable(s.ids for s in segments))
        positions = list(itertools.chain.from_iterable(s.positions for s in segments))
        logits = self._model_logits(
            batch,
            torch.tensor(_padded(ids, self.min_rows)),
            torch.tensor(_padded(positions, self.min_rows)),
            torch.tensor(_padded(rows, self.min_rows), dtype=torch.int64),
        )[: len(rows)].float()
        return torch.split(logits, [len(segments[index]) for index in sampled])

    def _model_logits(
        self, context: Any, ids: torch.Tensor, positions: torch.Tensor, kept_rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the model on rows of tokens.

        Args:
            context: the forward context, see `attention.set_forward_context`.
            ids, positions: (rows,) token ids and absolute positions.
            kept_rows: rows whose logits are wanted; None for all.

        Returns (kept rows, V) logits in the model's dtype.
        """
        arguments = forward_arguments(self.model, ids, positions)
        if self._selects_rows and kept_rows is not None:
            arguments["logits_to_keep"] = kept_rows
        with set_forward_context(context):
            logits: torch.Tensor = self.model(**arguments).logits[0]
        return logits if self._selects_rows or kept_rows is None else logits[kept_rows]


def device_responds(device: torch.device) -> bool:
    """Whether a device still computes. After an illegal access, CUDA fails whatever a process asks of it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


def _padded(row_values: list[int], rows: int) -> list[int]:
    """Extend a list with a value for each row to at least `rows`, by repeating the last one."""
    return row_values + row_values[-1:] * (rows - len(row_values))
