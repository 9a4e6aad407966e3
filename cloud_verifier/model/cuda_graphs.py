"""The model runner on CUDA: forwards of a few fixed sizes, each captured once as a CUDA graph and then replayed.

Everything that differs between two forwards is in one buffer of integers (`GraphInputs`), which one copy brings to the
device. A round allocates nothing and launches hardly anything, and only token ids and margins come back. Padding rows
that fill a forward up to its size attend to nothing of the other rows, and no other row attends to them.

Larger forwards, with long chunks of prompts, keep the GPU busy without a graph: they run kernel by kernel, with the
flash attention of `chunk_attention`, and compute logits only of the rows that are sampled.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cloud_verifier.model import kernels
from cloud_verifier.model.attention import get_forward_context
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.chunk_attention import PrefillChunk, attend_chunk, find_chunks, flash_takes, is_chunk
from cloud_verifier.model.fast_tier import PagedAttention
from cloud_verifier.model.kv_cache import PAGE_TOKENS, KVCachePool
from cloud_verifier.model.layer_compilation import compile_layers, uncompiled_unless_dynamic
from cloud_verifier.model.rope import LengthScaledRope
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import RowSampling, SampledTokens, sample_segments
from cloud_verifier.model.tensor_parallel import ForwardMode, TensorParallelGroup
from edge_runtime.protocol.sampling import Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rows of the captured forwards. Chosen: fine steps where padding is a large share, and few graphs to capture.
FORWARD_ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# With `exact`, every forward has this many rows, whatever it contains.
EXACT_ROWS = 128
MAX_SEGMENTS = 128
# Rows of one forward for prefill (see `TargetRunner.max_prefill_rows`). Chosen: 2,048 rows of a 7B model are enough for
# the GPU's full matrix rate; twice as many still fit beside its cache.
MAX_PREFILL_ROWS = 4096
# The same where all forwards are captured, as in a tensor-parallel group, whose followers see no segments.
MAX_CAPTURED_PREFILL_ROWS = 512
# Forwards that are not captured have a multiple of so many rows, for the sake of matrix kernels.
UNCAPTURED_STEP = 64
# Rows of one attention program, query heads of one KV head included: the least that tl.dot takes.
BLOCK_QUERIES = 16


class GraphInputs:
    """The integers that describe one forward of `rows` rows, on the device and, to be filled, in pinned host memory.

    Attributes:
        ids, positions: (rows,) token ids and absolute positions.
        pages, offsets: (rows,) where each row's keys and values are written.
        visible_prefix: (rows,) see `Segment`.
        slots: (rows,) LoRA slots.
        long_rope: (rows,) 1 for rows that use the second set of RoPE frequencies, else 0.
        blocks: (blocks, 3) segment, first row and number of rows of one attention program; 0 rows: no work.
        segments: (segments, 3) cached tokens before the segment, first row, number of rows.
        page_table: (segments, pages of the longest sequence).
        moves: (moves, 4) rows to move in the pool before the forward, see `kernels.move`.
        block_rows: most rows of a block.
        spans: number of programs that share a long sequence.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    visible_prefix: torch.Tensor
    slots: torch.Tensor
    long_rope: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    page_table: torch.Tensor
    moves: torch.Tensor

    def __init__(
        self, rows: int, context: int, group: int, device: torch.device, rope: LengthScaledRope | None = None
    ) -> None:
        """
        Args:
            context: longest sequence in tokens.
            group: most query heads that share a KV head.
            rope: the rotary embeddings of the model; None if all texts have the same frequencies.
        """
        self.rows = rows
        self._rope = rope
        self.block_rows = max(1, BLOCK_QUERIES // group)
        max_segments = min(rows, MAX_SEGMENTS)
        blocks = min(rows, max_segments + rows // self.block_rows)
        self._page_tokens = PAGE_TOKENS["cuda"]
        # The tree of a sequence that is nearly full may reach past the context.
        columns = -(-context // self._page_tokens) + 2
        self.spans = -(-context // kernels.SPAN_TOKENS)
        shapes = {
            "ids": (rows,),
            "positions": (rows,),
            "pages": (rows,),
            "offsets": (rows,),
            "visible_prefix": (rows,),
            "slots": (rows,),
            "long_rope": (rows,),
            "blocks": (blocks, 3),
            "segments": (max_segments, 3),
            "page_table": (max_segments, columns),
            "moves": (max_segments, 4),
        }
        total = sum(int(np.prod(shape)) for shape in shapes.values())
        self._pinned = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self._host: dict[str, npt.NDArray[np.int32]] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            self._host[name] = self._pinned[start:stop].numpy().reshape(shape)
            setattr(self, name, self.buffer[start:stop].view(shape))
            start = stop

    def fill(self, segments: Sequence[Segment], moves: Sequence[tuple[int, int, int, int]] = ()) -> None:
        """Write the inputs of a forward of `segments` and start their copy to the device."""
        host = self._host
        ids, positions, visible_prefix, slots = host["ids"], host["positions"], host["visible_prefix"], host["slots"]
        blocks: list[tuple[int, int, int]] = []
        extents: list[tuple[int, int, int]] = []
        row = 0
        for index, segment in enumerate(segments):
            stop = row + len(segment.ids)
            ids[row:stop], positions[row:stop] = segment.ids, segment.positions
            visible_prefix[row:stop] = segment.visible_prefix
            slots[row:stop] = segment.adapter_slot
            if self._rope and self._rope.switch:
                host["long_rope"][row:stop] = self._rope.long_rows(segment)
            host["page_table"][index, : len(segment.sequence.pages)] = segment.sequence.pages
            extents.append((segment.sequence.length, row, stop - row))
            blocks += [
                (index, first, min(self.block_rows, stop - first)) for first in range(row, stop, self.block_rows)
            ]
            row = stop
        host["moves"][: len(moves)] = np.array(moves, dtype=np.int32).reshape(-1, 4)
        host["moves"][len(moves) :] = 0
        extent = np.array(extents, dtype=np.int32).reshape(-1, 3)
        host["segments"][: len(extents)] = extent
        host["blocks"][: len(blocks)] = np.array(blocks, dtype=np.int32).reshape(-1, 3)
        host["blocks"][len(blocks) :] = 0
        segment_of_row = np.repeat(np.arange(len(extents)), extent[:, 2])
        cache_index = np.arange(row) - extent[segment_of_row, 1] + extent[segment_of_row, 0]
        host["pages"][:row] = host["page_table"][segment_of_row, cache_index // self._page_tokens]
        host["offsets"][:row] = cache_index % self._page_tokens
        # Padding rows are written to page 0, which is never read.
        for name in ("ids", "positions", "visible_prefix", "slots", "long_rope", "pages"):
            host[name][row:] = 0
        host["offsets"][row:] = np.arange(self.rows - row) % self._page_tokens
        self.buffer.copy_(self._pinned, non_blocking=True)


class GraphContext(NamedTuple):
    """Forward context (see `attention.set_forward_context`) on CUDA.

    Attributes:
        rows: of the forward, the first ones of `inputs`.
        chunks: segments whose attention is that of `chunk_attention`, where a layer's can be. All others are before.
        blocks: how many of the blocks of `inputs` have rows, without the chunks and with them; None for all.
    """

    inputs: GraphInputs
    rows: int
    slab: torch.Tensor
    lora_mask: torch.Tensor | None
    chunks: Sequence[PrefillChunk] = ()
    blocks: tuple[int | None, int | None] = (None, None)

    def long_rope_rows(self, _: Callable[[Segment], list[bool]]) -> torch.Tensor:
        return self.inputs.long_rope[: self.rows] != 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Attention of one layer; see `kernels.attend` for `options`."""
        kernels.store(key, value, self.slab, layer, self.inputs)
        flash = bool(self.chunks) and flash_takes(query, value, options["span"], options["softcap"], options["sinks"])
        rows = self.chunks[0].first if flash else self.rows
        parts: list[torch.Tensor] = []
        if rows:
            options |= {"kv_heads": key.shape[1], "value_size": value.shape[3], "blocks": self.blocks[not flash]}
            paged = kernels.attend(query[:, :, :rows], self.slab, layer, inputs=self.inputs, **options)
            if not flash:
                return paged
            parts.append(paged[0])
        scaling: float = options["scaling"]
        parts += [
            attend_chunk(query, key, value, slab=self.slab, layer=layer, scaling=scaling, chunk=chunk)
            for chunk in self.chunks
        ]
        padding = self.rows - sum(map(len, parts))
        return torch.cat([*parts, query.new_zeros(padding, query.shape[1], value.shape[3])])[None]


@torch.library.custom_op("flexspec::attend", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: torch.Tensor,
    scaling: float,
    span: int,
    chunked: bool,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attention.attend` on CUDA.

    To torch.compile it is a pure function although it writes to the pool: nothing else uses the pool in a forward.
    """
    context: GraphContext = get_forward_context()
    return context.attend(
        query, key, value, layer, scaling=scaling, span=span, chunked=chunked, softcap=softcap, sinks=sinks
    )


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


class _CapturedForward(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


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
        group: TensorParallelGroup | None = None,
    ) -> None:
        super().__init__(model, attention)
        self._group = group
        self.exact = exact
        self._sizes = (EXACT_ROWS,) if exact else FORWARD_ROWS
        self.max_rows, self.max_segments = self._sizes[-1], min(MAX_SEGMENTS, self._sizes[-1])
        self.max_prefill_rows = EXACT_ROWS if exact else MAX_CAPTURED_PREFILL_ROWS

        def make_inputs(rows: int) -> GraphInputs:
            return GraphInputs(rows, context, attention.group, self.shape.device, self.rope)

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
                self.leave_uncompiled()
        try:
            self._capture(pool, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._mode = "forward"
            log.warning("a forward of this model cannot be captured as a CUDA graph and runs without one: %s", error)

    @_on_own_gpu
    def leave_uncompiled(self) -> bool:
        """Run the layers as transformers made them from now on; return whether they were compiled."""
        layers, self._compiled_layers = self._compiled_layers, []
        for layer in layers:
            layer._compiled_call_impl = None
        self._forget_graphs()
        return bool(layers)

    @_on_own_gpu
    def warm_up(self, pool: KVCachePool) -> None:
        """Capture the graphs of all sizes, the largest first, whose memory the others use too."""
        for rows in reversed(self._sizes):
            self._inputs[rows].fill([])
            if self._group:
                self._group.send(self._mode, rows, self._inputs[rows].buffer)
            getattr(self, self._mode)(pool, rows)
        if self._long_inputs:
            # Twice: the first one may compile.
            for _ in range(2):
                self._long_inputs.fill([])
                self._run_long(pool, self._long_inputs.rows, kept=[0])
        torch.cuda.synchronize()

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
            logits = self._forward(pool, largest, largest.rows)
            sample_segments(logits, [(RowSampling(Sampling(1.0), list(range(largest.rows))), largest.rows)])

        measure(run_and_sample)
        if long_inputs := self._long_inputs:
            long_inputs.fill([])
            measure(lambda: self._run_long(pool, long_inputs.rows, kept=[0]))
        # The keys and values of the longest sequence, gathered for one layer: two copies.
        gathered = 2 * self._context_tokens * self.shape.bytes_per_token // self.shape.layers
        torch.cuda.empty_cache()
        return sum(peaks) + gathered

    @_on_own_gpu
    @torch.inference_mode()
    def run(self, pool: KVCachePool, segments: Sequence[Segment]) -> list[SampledTokens | None]:
        sampled = [segment for segment in segments if segment.sampling]
        if self._is_long(segments, MAX_CAPTURED_PREFILL_ROWS):
            logits = self._long_logits(pool, segments)
        else:
            size = self._fill_inputs(pool, segments, self._mode)
            logits = getattr(self, self._mode)(pool, size)
            if len(sampled) < len(segments):
                logits = logits[self._to_device(_sampled_rows(segments))] if sampled else logits
        if not sampled:
            # The pinned inputs may be overwritten only after the device has read them; and whoever comes next is not to
            # wait for more than one forward.
            torch.cuda.current_stream().synchronize()
            return [None] * len(segments)
        tokens = iter(sample_segments(logits, [(segment.sampling, len(segment)) for segment in sampled]))
        return [next(tokens) if segment.sampling else None for segment in segments]

    @_on_own_gpu
    @torch.inference_mode()
    def logits(self, pool: KVCachePool, segments: Sequence[Segment]) -> tuple[torch.Tensor, ...]:
        if self._is_long(segments, 0):
            logits = self._long_logits(pool, segments).float()
        else:
            size = self._fill_inputs(pool, segments, "forward")
            logits = self.forward(pool, size)[self._to_device(_sampled_rows(segments))].float()
        # See `run`.
        torch.cuda.synchronize()
        return torch.split(logits, [len(segment) for segment in segments if segment.sampling])

    def _is_long(self, segments: Sequence[Segment], rows: int) -> bool:
        """Whether segments need a forward that is not captured: those with long chunks and more than `rows` rows."""
        if self._long_inputs is None:
            return False
        total = sum(map(len, segments))
        return total > self._sizes[-1] or (total > rows and any(map(is_chunk, segments)))

    def _long_logits(self, pool: KVCachePool, segments: Sequence[Segment]) -> torch.Tensor:
        """(sampled rows, V) logits of a forward that is not captured, in the order of the segments."""
        assert self._long_inputs is not None
        ordered = sorted(segments, key=is_chunk)
        moves = self._reserve(pool, segments)
        self._long_inputs.fill(ordered, moves)
        counts = [-(-len(segment) // self._long_inputs.block_rows) for segment in ordered]
        paged = sum(count for count, segment in zip(counts, ordered, strict=True) if not is_chunk(segment))
        rows = sum(map(len, ordered))
        return self._run_long(
            pool,
            min(self._long_inputs.rows, -(-rows // UNCAPTURED_STEP) * UNCAPTURED_STEP),
            kept=_sampled_rows(ordered),
            chunks=find_chunks(ordered, pool.page_tokens, self.shape.device),
            blocks=(paged, sum(counts)),
        )

    def _run_long(
        self,
        pool: KVCachePool,
        rows: int,
        *,
        kept: list[int],
        chunks: Sequence[PrefillChunk] = (),
        blocks: tuple[int | None, int | None] = (None, None),
    ) -> torch.Tensor:
        assert self._long_inputs is not None
        with torch.inference_mode(), uncompiled_unless_dynamic():
            # Without any row the head would have nothing to multiply.
            return self._forward(
                pool, self._long_inputs, rows, kept=self._to_device(kept or [0]), chunks=chunks, blocks=blocks
            )

    def _to_device(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).pin_memory().to(self.shape.device, non_blocking=True)

    def _reserve(self, pool: KVCachePool, segments: Sequence[Segment]) -> list[tuple[int, int, int, int]]:
        """Take pages for the segments; return the pending row moves of the pool."""
        for segment in segments:
            pool.reserve(segment.sequence, segment.sequence.length + len(segment))
        return pool.take_moves()

    def _fill_inputs(self, pool: KVCachePool, segments: Sequence[Segment], mode: ForwardMode) -> int:
        """Fill the inputs of the smallest forward that holds the segments, and send them to followers.

        Returns the rows of that forward.
        """
        moves = self._reserve(pool, segments)
        # Moves may also belong to sequences that are not in this forward.
        needed = max(sum(map(len, segments)), len(moves))
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

    def forward(self, pool: KVCachePool, rows: int) -> torch.Tensor:
        """(rows, V) logits of the forward described by the inputs, without a graph."""
        with torch.inference_mode():
            return self._forward(pool, self._inputs[rows], rows)

    def replay(self, pool: KVCachePool, rows: int) -> torch.Tensor:
        """(rows, V) logits of the forward described by the inputs; overwritten by the next forward."""
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
        return captured.logits

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
            logits = self._forward(pool, inputs, inputs.rows)
        log.info("captured a forward of %d rows", inputs.rows)
        return _CapturedForward(graph, logits)

    def _forward(
        self,
        pool: KVCachePool,
        inputs: GraphInputs,
        rows: int,
        *,
        kept: torch.Tensor | None = None,
        chunks: Sequence[PrefillChunk] = (),
        blocks: tuple[int | None, int | None] = (None, None),
    ) -> torch.Tensor:
        """Run the first `rows` rows of `inputs`; see `GraphContext`. Returns (rows, V) logits, or (kept, V)."""
        kernels.move(pool.slabs[0], inputs.moves)
        mask = self.adapters.row_mask(inputs.slots[:rows])
        context = GraphContext(inputs, rows, pool.slabs[0], mask, chunks=chunks, blocks=blocks)
        return self._model_logits(context, inputs.ids[:rows].long(), inputs.positions[:rows].long(), kept)


def _sampled_rows(segments: Sequence[Segment]) -> list[int]:
    """The rows of a forward whose segments have `sampling`."""
    starts = itertools.accumulate(map(len, segments), initial=0)
    pairs = zip(starts, segments, strict=False)
    return [row for start, segment in pairs if segment.sampling for row in range(start, start + len(segment))]
