"""The model runner on CUDA: forwards of a few fixed sizes, each captured once as a CUDA graph and then replayed.

Everything that differs between two forwards is in one buffer of integers (`graph_inputs`), which one copy brings to the
device. A round allocates nothing and launches hardly anything, and only token ids and margins come back. Padding rows
that fill a forward up to its size attend to nothing of the other rows, and no other row attends to them.

Larger forwards, with long chunks of prompts, keep the GPU busy without a graph: they run kernel by kernel, with the
flash attention of `chunk_attention`, and compute logits only of the rows that are sampled.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from cloud_verifier.model import kernels
from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.chunk_attention import PrefillChunk, find_chunks, is_chunk
from cloud_verifier.model.fast_tier import PagedAttention
from cloud_verifier.model.forward_ahead import ForwardAhead, PendingTokens, can_go_ahead
from cloud_verifier.model.fused_projections import ProjectionFusion
from cloud_verifier.model.graph_attention import GraphContext
from cloud_verifier.model.graph_inputs import MAX_SEGMENTS, GraphInputs
from cloud_verifier.model.kv_cache import CachedSequence, KVCacheFull, KVCachePool
from cloud_verifier.model.layer_compilation import compile_layers, uncompiled_unless_dynamic
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import (
    GREEDY,
    PlainSampledTokens,
    RowSampling,
    SampledTokens,
    sample_segments,
)
from cloud_verifier.model.sampling_kernel import sample_plain
from cloud_verifier.model.tensor_parallel import ForwardMode, TensorParallelGroup
from edge_runtime.protocol.sampling import Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rows of the captured forwards. Chosen: fine steps where padding is a large share, and few graphs to capture.
FORWARD_ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# With `exact`, every forward has this many rows, whatever it contains.
EXACT_ROWS = 128
# Rows of one forward for prefill (see `TargetRunner.max_prefill_rows`). Chosen: 2,048 rows of a 7B model are enough for
# the GPU's full matrix rate; twice as many still fit beside its cache.
MAX_PREFILL_ROWS = 4096
# The same where all forwards are captured, as in a tensor-parallel group, whose followers see no segments.
MAX_CAPTURED_PREFILL_ROWS = 512
# Forwards that are not captured have a multiple of so many rows: the padding is a small share, and there are few
# kernels of products, each of which is loaded by the first forward that needs it.
UNCAPTURED_STEP = 128


class ForwardResult(NamedTuple):
    """What a forward leaves on the device.

    Attributes:
        logits: (rows, V), or only of those rows that are sampled.
        chosen: (2, rows) of the same rows, see `sampling_kernel.sample_plain`.
    """

    logits: torch.Tensor
    chosen: torch.Tensor


class _CapturedForward(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: ForwardResult


def _on_own_gpu(method: Callable[..., T]) -> Callable[..., T]:
    """Run a method with the runner's GPU as the current one.

    The current GPU of a new thread is the first, and kernels, streams and graphs use the current GPU.
    """

    @functools.wraps(method)
    def wrapper(runner: GraphRunner, *args: Any) -> T:
        with torch.cuda.device(runner.shape.device):
            return method(runner, *args)

    return wrapper


class GraphRunner(TargetRunner):
    """Runs one model and its LoRA adapters on CUDA.

    Args:
        context: longest sequence in tokens.
        exact: every forward has the same number of rows, so that the result of a row cannot depend on the rest of the
            batch. Siblings are not scored then, because they would not be where a sequence's own keys are.
        compiled: let torch.compile fuse the operations between the products of a layer.
        fusion: the model's fused linear layers, which `simplify` may undo.
        group: the tensor-parallel group over which the model is sharded; its followers take part in every forward.
    """

    def __init__(
        self,
        model: Any,
        attention: PagedAttention,
        context: int,
        *,
        exact: bool = False,
        compiled: bool = False,
        fusion: ProjectionFusion | None = None,
        group: TensorParallelGroup | None = None,
    ) -> None:
        super().__init__(model, attention)
        self._group = group
        self._fusion = fusion
        self.exact = exact
        self._sizes = (EXACT_ROWS,) if exact else FORWARD_ROWS
        # More sampled rows would take more memory than `measure_workspace` measures.
        self.max_rows = self.max_round_rows = self._sizes[-1]
        self.max_segments = min(MAX_SEGMENTS, self._sizes[-1])
        self.max_prefill_rows = EXACT_ROWS if exact else MAX_CAPTURED_PREFILL_ROWS

        def make_inputs(rows: int) -> GraphInputs:
            return GraphInputs(rows, context, attention.group, self.shape.device, rope=self.rope, exact=exact)

        self._inputs = {rows: make_inputs(rows) for rows in self._sizes}
        # Those of forwards that are never captured, if there are such.
        self._long_inputs: GraphInputs | None = None
        if not exact and not group:
            self.max_rows = self.max_prefill_rows = MAX_PREFILL_ROWS
            self._long_inputs = make_inputs(self.max_rows)
        self._context_tokens = context
        # By rows and pool; and those that could not be captured.
        self._graphs: dict[tuple[int, int], _CapturedForward] = {}
        self._uncapturable: set[tuple[int, int]] = set()
        # The memory of all graphs: they run one after the other, and what one returns is read before the next.
        self._graph_memory: Any = None
        self._mode: ForwardMode = "replay"
        self._lora_layout_version = -1
        # Followers get whole inputs from the host, and RoPE frequencies that change do so by the text's length.
        self.runs_ahead = group is None and not (self.rope and self.rope.switch)
        self._ahead: ForwardAhead | None = None
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                # A tensor on the device instead of a constant, so that the compiled code of all layers is the same.
                number = torch.tensor(module.layer_idx, dtype=torch.int32, device=self.shape.device)
                module.register_buffer("layer_number", number, persistent=False)
        self._compiled_layers = compile_layers(model) if compiled else []

    @_on_own_gpu
    def try_capture(self) -> None:
        """Find out whether layers can be compiled and a forward captured; otherwise forwards run without, slower.

        Some layers of experts ask the device which experts have rows, which a graph cannot hold.
        """
        inputs = self._inputs[self._sizes[0]]
        inputs.fill([])
        pool = KVCachePool(self.shape, 1)
        if self._compiled_layers:
            try:
                self.forward(pool, inputs.rows)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                log.warning("layers of this model cannot be compiled and run as they are: %.300s", error)
                self._leave_uncompiled()
        try:
            self._capture(pool, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._mode = "forward"
            log.warning("a forward of this model cannot be captured as a CUDA graph and runs without one: %s", error)

    @_on_own_gpu
    def simplify(self) -> bool:
        """See `TargetRunner.simplify`."""
        return self._leave_uncompiled() or self._leave_unfused()

    def round_cache(self, dtype: torch.dtype) -> None:
        """See `TargetRunner.round_cache`."""
        self.shape = self.shape._replace(dtype=dtype)
        self._forget_graphs()

    def _leave_uncompiled(self) -> bool:
        """Run the layers as transformers made them from now on; return whether they were compiled."""
        layers, self._compiled_layers = self._compiled_layers, []
        for layer in layers:
            layer._compiled_call_impl = None
        self._forget_graphs()
        return bool(layers)

    def _leave_unfused(self) -> bool:
        """Run the linear layers one by one from now on; return whether some were fused."""
        self._forget_graphs()
        return self._fusion is not None and self._fusion.undo()

    @_on_own_gpu
    def warm_up(self, pool: KVCachePool) -> None:
        """Capture the graphs of all sizes, the largest first, whose memory the others use too."""
        for rows in reversed(self._sizes):
            self._inputs[rows].fill([])
            if self._group:
                self._group.send(self._mode, rows, self._inputs[rows].buffer)
            getattr(self, self._mode)(pool, rows)
        if self._long_inputs:
            self._long_inputs.fill([])
            # The first one may compile.
            for rows in range(self._long_inputs.rows, self._sizes[0], -2 * UNCAPTURED_STEP):
                self._forward_long(pool, rows, kept=[0])
            self._warm_up_mixed(pool)
        torch.cuda.synchronize()

    def _warm_up_mixed(self, pool: KVCachePool) -> None:
        """Run a long chunk of a prompt after a shorter one, beside a round: the kernels are compiled for each kind."""
        chunk, other = CachedSequence(), CachedSequence()
        ids = [0] * (MAX_CAPTURED_PREFILL_ROWS + 1)
        try:
            for rows in (len(ids), len(ids) - 1):
                if chunk.length + rows >= self._context_tokens:
                    break
                segments = [Segment.from_tokens(chunk, ids[:rows])]
                self.run(pool, segments)
                segments.append(Segment.from_tokens(other, [0], sampling=GREEDY))
                self.run(pool, segments)
                pool.keep(chunk, list(range(rows)))
        except KVCacheFull:
            log.info("the KV cache is too small to try a long prompt beside a round")
        finally:
            for sequence in (chunk, other):
                pool.release(sequence)

    @_on_own_gpu
    @torch.inference_mode()
    def measure_workspace(self) -> int:
        """See `TargetRunner.measure_workspace`: the peaks of the largest forwards, measured without cached tokens."""
        device, pool = self.shape.device, KVCachePool(self.shape, 1)
        peaks: list[int] = []

        def measure(forward: Callable[[], object]) -> None:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            forward()
            torch.cuda.synchronize(device)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)

        largest = self._inputs[self._sizes[-1]]
        largest.fill([])

        def run_and_sample() -> None:
            logits = self._forward(pool, largest, largest.rows).logits
            sample_segments(logits, [(RowSampling(Sampling(1.0), list(range(largest.rows))), largest.rows)])

        measure(run_and_sample)
        if long_inputs := self._long_inputs:
            long_inputs.fill([])
            measure(lambda: self._forward_long(pool, long_inputs.rows, kept=[0]))
        # The keys and values of the longest sequence, gathered for one layer: two copies.
        gathered = 2 * self._context_tokens * self.shape.bytes_per_token // self.shape.layers
        torch.cuda.empty_cache()
        return sum(peaks) + gathered

    @_on_own_gpu
    @torch.inference_mode()
    def run(
        self,
        pool: KVCachePool,
        segments: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        ahead, self._ahead = self._ahead, None
        first_rows = ahead.rows_of(pool, segments) if ahead else None
        if ahead and first_rows is not None:
            tokens, chosen, logits = ahead.tokens, ahead.chosen, None
        else:
            if ahead:
                # Its inputs are to be overwritten.
                ahead.tokens.read()
            if self._is_long(segments, MAX_CAPTURED_PREFILL_ROWS):
                logits, chosen = self._run_long(pool, segments)
                counts = [len(segment.ids) if segment.sampling else 0 for segment in segments]
            else:
                size = self._fill_inputs(pool, segments, self._mode)
                logits, chosen = getattr(self, self._mode)(pool, size)
                counts = [len(segment.ids) for segment in segments]
            first_rows = list(itertools.accumulate(counts, initial=0))[:-1]
            tokens = PendingTokens(chosen)
        if continues and self.runs_ahead and can_go_ahead(segments):
            self._ahead = self._go_ahead(pool, segments, first_rows, tokens, chosen)
        meanwhile()
        if not any(segment.sampling for segment in segments):
            # The pinned inputs may be overwritten only after the device has read them; and whoever comes next is not to
            # wait for more than one forward.
            torch.cuda.current_stream().synchronize()
            return [None] * len(segments)
        return self._read_tokens(tokens, logits, segments, first_rows)

    def _go_ahead(
        self,
        pool: KVCachePool,
        segments: Sequence[Segment],
        rows: list[int],
        tokens: PendingTokens,
        chosen: torch.Tensor,
    ) -> ForwardAhead | None:
        """Launch the forward of the tokens after `segments`, if the KV cache has room for them.

        Args:
            rows, tokens, chosen: where these tokens are: rows of what the forward of the segments samples.
        """
        try:
            for segment in segments:
                pool.reserve(segment.sequence, segment.sequence.length + 2)
        except KVCacheFull:
            return None
        size = next(size for size in self._sizes if size >= len(segments))
        inputs = self._inputs[size]
        inputs.fill(segments, ahead=1)
        following = chosen[0, : len(rows)] if rows == list(range(len(rows))) else chosen[0, self._to_device(rows)]
        inputs.ids[: len(rows)].copy_(following)
        return ForwardAhead(pool, segments, rows, tokens, getattr(self, self._mode)(pool, size).chosen)

    def _read_tokens(
        self,
        tokens: PendingTokens,
        logits: torch.Tensor | None,
        segments: Sequence[Segment],
        first_rows: list[int],
    ) -> list[SampledTokens | None]:
        """The tokens after the rows of all sampled segments, each of which begins at a row of `tokens` and `logits`.

        Args:
            logits: may be None if all are sampled in the forward.
        """
        parts = list(zip(segments, first_rows, strict=True))
        others = [part for part in parts if part[0].sampling and not part[0].sampling.is_plain]
        other_tokens: Iterator[SampledTokens | None] = iter(())
        if others:
            assert logits is not None
            own = [row for segment, first in others for row in range(first, first + len(segment))]
            sampled = sample_segments(
                logits[self._to_device(own)], [(segment.sampling, len(segment)) for segment, _ in others]
            )
            other_tokens = iter(sampled)
        ids, margins = tokens.read()
        return [
            None
            if segment.sampling is None
            else PlainSampledTokens(ids, margins, first)
            if segment.sampling.is_plain
            else next(other_tokens)
            for segment, first in parts
        ]

    @_on_own_gpu
    @torch.inference_mode()
    def logits(self, pool: KVCachePool, segments: Sequence[Segment]) -> tuple[torch.Tensor, ...]:
        if self._is_long(segments, 0):
            logits = self._run_long(pool, segments).logits.float()
        else:
            size = self._fill_inputs(pool, segments, "forward")
            logits = self.forward(pool, size).logits[self._to_device(_sampled_rows(segments))].float()
        # See `run`.
        torch.cuda.synchronize()
        return torch.split(logits, [len(segment) for segment in segments if segment.sampling])

    def _is_long(self, segments: Sequence[Segment], rows: int) -> bool:
        """Whether segments need a forward that is not captured: those with long chunks and more than `rows` rows."""
        if self._long_inputs is None:
            return False
        total = sum(len(segment.ids) for segment in segments)
        return total > self._sizes[-1] or (total > rows and any(map(is_chunk, segments)))

    def _run_long(self, pool: KVCachePool, segments: Sequence[Segment]) -> ForwardResult:
        """A forward that is not captured; its result has the sampled rows, in the order of the segments."""
        assert self._long_inputs is not None
        ordered = sorted(segments, key=is_chunk)
        moves = self._reserve(pool, segments)
        chunks = find_chunks(ordered, pool.page_tokens, self.shape.device)
        self._long_inputs.fill(ordered, moves, len(chunks))
        rows = -(-sum(map(len, ordered)) // UNCAPTURED_STEP) * UNCAPTURED_STEP
        return self._forward_long(pool, min(self._long_inputs.rows, rows), kept=_sampled_rows(ordered), chunks=chunks)

    def _forward_long(
        self,
        pool: KVCachePool,
        rows: int,
        *,
        kept: list[int],
        chunks: Sequence[PrefillChunk] = (),
    ) -> ForwardResult:
        assert self._long_inputs is not None
        with torch.inference_mode(), uncompiled_unless_dynamic():
            # Without any row the head would have nothing to multiply.
            result = self._forward(pool, self._long_inputs, rows, kept=self._to_device(kept or [0]), chunks=chunks)
        return ForwardResult(result.logits[: len(kept)], result.chosen[:, : len(kept)])

    def _to_device(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).pin_memory().to(self.shape.device, non_blocking=True)

    def _reserve(self, pool: KVCachePool, segments: Sequence[Segment]) -> list[tuple[int, int, int, int]]:
        """Take pages for the segments; return the pending row moves of the pool."""
        for segment in segments:
            pool.reserve(segment.sequence, segment.sequence.length + len(segment.ids))
        return pool.take_moves()

    def _fill_inputs(self, pool: KVCachePool, segments: Sequence[Segment], mode: ForwardMode) -> int:
        """Fill the inputs of the smallest forward that holds the segments, and send them to followers.

        Returns the rows of that forward.
        """
        moves = self._reserve(pool, segments)
        # Moves may also belong to sequences that are not in this forward.
        needed = max(sum(len(segment.ids) for segment in segments), len(moves))
        rows = next(size for size in self._sizes if size >= needed)
        self._inputs[rows].fill(segments, moves)
        if self._group:
            self._group.send(mode, rows, self._inputs[rows].buffer)
        return rows

    def follow_leader(self, pool: KVCachePool) -> None:
        """Run the leader's forwards on this process's shard until the leader shuts down."""
        assert self._group is not None
        while command := self._group.receive(lambda rows: self._inputs[rows].buffer):
            getattr(self, command.mode)(pool, command.rows)

    def shut_down(self) -> None:
        if self._group and self._group.rank == 0:
            self._group.stop_followers()

    def forward(self, pool: KVCachePool, rows: int) -> ForwardResult:
        """Run the forward described by the inputs, without a graph."""
        with torch.inference_mode():
            return self._forward(pool, self._inputs[rows], rows)

    def replay(self, pool: KVCachePool, rows: int) -> ForwardResult:
        """Run the forward described by the inputs; the next forward overwrites the result."""
        if self._lora_layout_version != self.adapters.layout_version:
            # Graphs hold the old addresses of the adapters.
            self._forget_graphs()
            self._lora_layout_version = self.adapters.layout_version
        captured = self._graphs.get((rows, id(pool)))
        if captured is None and (rows, id(pool)) not in self._uncapturable:
            try:
                captured = self._graphs[rows, id(pool)] = self._capture(pool, self._inputs[rows])
            except RuntimeError as error:
                torch.cuda.synchronize()
                self._uncapturable.add((rows, id(pool)))
                log.warning("a forward of %d rows cannot be captured and runs without a graph: %.300s", rows, error)
        if captured is None:
            # Not an error: the inputs hold row moves, which another attempt would not have.
            return self.forward(pool, rows)
        captured.graph.replay()
        return captured.result

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        self._uncapturable.clear()
        # Its memory goes with the last graph, and torch takes no further ones into it.
        self._graph_memory = None

    @torch.inference_mode()
    def _capture(self, pool: KVCachePool, inputs: GraphInputs) -> _CapturedForward:
        # With empty inputs: a forward moves rows in the pool and then overwrites their sources, so none may run twice.
        filled = inputs.buffer.clone()
        inputs.buffer.zero_()
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch annotates it partly
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._forward(pool, inputs, inputs.rows)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            inputs.buffer.copy_(filled)
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:
            self._graph_memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            result = self._forward(pool, inputs, inputs.rows)
        log.info("captured a forward of %d rows", inputs.rows)
        return _CapturedForward(graph, result)

    def _forward(
        self,
        pool: KVCachePool,
        inputs: GraphInputs,
        rows: int,
        *,
        kept: torch.Tensor | None = None,
        chunks: Sequence[PrefillChunk] = (),
    ) -> ForwardResult:
        """Run the first `rows` rows of `inputs`; see `GraphContext`. The result has all rows, or those of `kept`."""
        kernels.move(pool.slabs[0], inputs.moves)
        mask = self.adapters.row_mask(inputs.slots[:rows])
        context = GraphContext(inputs, rows, pool.slabs[0], mask, chunks=chunks)
        logits = self._model_logits(context, inputs.ids[:rows].long(), inputs.positions[:rows].long(), kept)
        return ForwardResult(logits, sample_plain(logits, inputs, kept))


def _sampled_rows(segments: Sequence[Segment]) -> list[int]:
    """The rows of a forward whose segments have `sampling`."""
    starts = itertools.accumulate(map(len, segments), initial=0)
    pairs = zip(starts, segments, strict=False)
    return [row for start, segment in pairs if segment.sampling for row in range(start, start + len(segment))]
