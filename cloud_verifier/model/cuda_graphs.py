"""The model runner on CUDA: forwards of a few fixed sizes, each captured once as a CUDA graph and then replayed.

Everything that differs between two forwards is in one buffer of integers (`GraphInputs`), which one copy brings to the
device. A round allocates nothing and launches hardly anything, and only token ids and margins come back. Padding rows
that fill a forward up to its size attend to nothing of the other rows, and no other row attends to them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cloud_verifier.model import kernels
from cloud_verifier.model.attention import get_forward_context
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.fast_tier import PagedAttention
from cloud_verifier.model.kv_cache import PAGE_TOKENS, KVCachePool
from cloud_verifier.model.rope import LengthScaledRope
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import SampledTokens, sample_segments
from cloud_verifier.model.tensor_parallel import ForwardMode, TensorParallelGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rows of the captured forwards. Chosen: fine steps where padding is a large share, and few graphs to capture.
FORWARD_ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# With `exact`, every forward has this many rows, whatever it contains.
EXACT_ROWS = 128
MAX_SEGMENTS = 128
# With `exact` off: rows of one forward for prefill (see `TargetRunner.max_prefill_rows`).
MAX_PREFILL_ROWS = 512
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


class _GraphContext(NamedTuple):
    """Forward context (see `attention.set_forward_context`) on CUDA."""

    inputs: GraphInputs
    slab: torch.Tensor
    lora_mask: torch.Tensor | None

    def long_rope_rows(self, _: Callable[[Segment], list[bool]]) -> torch.Tensor:
        return self.inputs.long_rope != 0


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
    context: _GraphContext = get_forward_context()
    kernels.store(key, value, context.slab, layer, context.inputs)
    return kernels.attend(
        query,
        context.slab,
        layer,
        scaling,
        context.inputs,
        kv_heads=key.shape[1],
        value_size=value.shape[3],
        span=span,
        chunked=chunked,
        softcap=softcap,
        sinks=sinks,
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
        compiled: let torch.compile fuse the operations between the products of a layer, once per forward size.
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
        self.max_prefill_rows = EXACT_ROWS if exact else MAX_PREFILL_ROWS
        config = model.config
        self._inputs = {
            rows: GraphInputs(rows, context, attention.group, self.shape.device, self.rope) for rows in self._sizes
        }
        self._graphs: dict[tuple[int, int], _CapturedForward] = {}
        self._mode: ForwardMode = "replay"
        self._lora_layout_version = -1
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                # A tensor on the device instead of a constant, so that the compiled code of all layers is the same.
                number = torch.tensor(module.layer_idx, dtype=torch.int32, device=self.shape.device)
                module.register_buffer("layer_number", number, persistent=False)

        if compiled:
            for layer in next(
                part
                for part in model.modules()
                if isinstance(part, torch.nn.ModuleList) and len(part) == config.num_hidden_layers
            ):
                layer.compile(dynamic=False)

    @_on_own_gpu
    def try_capture(self) -> None:
        """Find out whether a forward can be captured; otherwise forwards run without graphs, slower.

        Some layers of experts ask the device which experts have rows, which a graph cannot hold.
        """
        inputs = self._inputs[self._sizes[0]]
        inputs.fill([])
        try:
            self._capture(KVCachePool(self.shape, 1), inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._mode = "forward"
            log.warning("a forward of this model cannot be captured as a CUDA graph and runs without one: %s", error)

    @_on_own_gpu
    def warm_up(self, pool: KVCachePool) -> None:
        """Capture the graphs of all sizes."""
        for rows in self._sizes:
            self._inputs[rows].fill([])
            if self._group:
                self._group.send(self._mode, rows, self._inputs[rows].buffer)
            getattr(self, self._mode)(pool, rows)

    @_on_own_gpu
    @torch.inference_mode()
    def run(self, pool: KVCachePool, segments: Sequence[Segment]) -> list[SampledTokens | None]:
        size = self._fill_inputs(pool, segments, self._mode)
        logits = getattr(self, self._mode)(pool, size)
        return sample_segments(logits, [(segment.sampling, len(segment)) for segment in segments])

    @_on_own_gpu
    @torch.inference_mode()
    def logits(self, pool: KVCachePool, segments: Sequence[Segment]) -> tuple[torch.Tensor, ...]:
        size = self._fill_inputs(pool, segments, "forward")
        logits = self.forward(pool, size).float()
        # The pinned inputs may be overwritten only after the device has read them.
        torch.cuda.synchronize()
        parts = torch.split(logits[: sum(map(len, segments))], [len(segment) for segment in segments])
        return tuple(part for part, segment in zip(parts, segments, strict=True) if segment.sampling)

    def _fill_inputs(self, pool: KVCachePool, segments: Sequence[Segment], mode: ForwardMode) -> int:
        """Fill the inputs of the smallest forward that holds the segments, and send them to followers.

        Returns the rows of that forward.
        """
        for segment in segments:
            pool.reserve(segment.sequence, segment.sequence.length + len(segment))
        moves = pool.take_moves()
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
            return self._forward(pool, self._inputs[rows])

    def replay(self, pool: KVCachePool, rows: int) -> torch.Tensor:
        """(rows, V) logits of the forward described by the inputs; overwritten by the next forward of this size."""
        if self._lora_layout_version != self.adapters.layout_version:
            # Graphs hold the old addresses of the adapters.
            self._graphs.clear()
            self._lora_layout_version = self.adapters.layout_version
        captured = self._graphs.get((rows, id(pool)))
        if captured is None:
            captured = self._graphs[rows, id(pool)] = self._capture(pool, self._inputs[rows])
        captured.graph.replay()
        return captured.logits

    @torch.inference_mode()
    def _capture(self, pool: KVCachePool, inputs: GraphInputs) -> _CapturedForward:
        # With empty inputs: a forward moves rows in the pool and then overwrites their sources, so none may run twice.
        filled = inputs.buffer.clone()
        inputs.buffer.zero_()
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch annotates it partly
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(pool, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        inputs.buffer.copy_(filled)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._forward(pool, inputs)
        log.info("captured a forward of %d rows", inputs.rows)
        return _CapturedForward(graph, logits)

    def _forward(self, pool: KVCachePool, inputs: GraphInputs) -> torch.Tensor:
        kernels.move(pool.slabs[0], inputs.moves)
        context = _GraphContext(inputs, pool.slabs[0], self.adapters.row_mask(inputs.slots))
        return self._model_logits(context, inputs.ids.long(), inputs.positions.long(), None)
