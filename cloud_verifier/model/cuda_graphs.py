"""The runner on CUDA: forwards of a few sizes, each captured once as a graph and replayed from then on.

Everything that differs from one forward to the next is a plan of integers in one buffer, which one copy brings to the
device; nothing is allocated and hardly anything launched for a round, and what comes back is ids and margins. Rows that
fill a forward up to its size see nothing of the others and are seen by none.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from cloud_verifier.model import kernels
from cloud_verifier.model.attention import current, running
from cloud_verifier.model.batch import Piece
from cloud_verifier.model.kv_cache import PAGE, Pool
from cloud_verifier.model.runner import Chosen, Runner
from cloud_verifier.model.sampling import Choice, Warping, choose
from cloud_verifier.model.tensor_parallel import Team
from edge_runtime.protocol.sampling import Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")

SIZES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Of `exact`: every forward has this size, whoever is in it.
EXACT_ROWS = 128
MOST_PIECES = 128
GREEDY = Sampling()


class Plan:
    """The integers of one forward of `rows` rows, on the device and, to be filled, on the host.

    Attributes:
        pages, offsets: (rows,) where each row's keys and values go.
        limits: (rows,) see `Piece`.
        slots: (rows,) of adapters.
        blocks: (blocks, 3) piece, first row and rows of what one program attends to; no rows: nothing.
        pieces: (pieces, 3) tokens before it, first row, rows.
        table: (pieces, pages of the longest text).
        moves: (moves, 4) rows that move in the pool beforehand, see `kernels.move`.
        block_rows: rows of a block at most.
        spans: programs that share a long text.
    """

    def __init__(self, rows: int, context: int, group: int, device: torch.device) -> None:
        self.rows = rows
        self.block_rows = max(1, 16 // group)
        most = min(rows, MOST_PIECES)
        blocks = min(rows, most + rows // self.block_rows)
        self._page = PAGE["cuda"]
        # A tree may stick out of a text that is nearly full.
        columns = -(-context // self._page) + 2
        self.spans = -(-context // kernels.SPAN)
        shapes = {
            "ids": (rows,),
            "positions": (rows,),
            "pages": (rows,),
            "offsets": (rows,),
            "limits": (rows,),
            "slots": (rows,),
            "blocks": (blocks, 3),
            "pieces": (most, 3),
            "table": (most, columns),
            "moves": (most, 4),
        }
        total = sum(int(np.prod(shape)) for shape in shapes.values())
        self._pinned = torch.zeros(total, dtype=torch.int32, pin_memory=True)
        self.buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self._host: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            self._host[name] = self._pinned[start:stop].numpy().reshape(shape)
            setattr(self, name, self.buffer[start:stop].view(shape))
            start = stop

    ids: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    limits: torch.Tensor
    slots: torch.Tensor
    blocks: torch.Tensor
    pieces: torch.Tensor
    table: torch.Tensor
    moves: torch.Tensor

    def fill(self, pieces: Sequence[Piece], moves: Sequence[tuple[int, int, int, int]] = ()) -> None:
        """Writes what the pieces say, and sends it to the device."""
        host = self._host
        ids, positions, limits, slots = host["ids"], host["positions"], host["limits"], host["slots"]
        blocks: list[tuple[int, int, int]] = []
        facts: list[tuple[int, int, int]] = []
        row = 0
        for index, piece in enumerate(pieces):
            stop = row + len(piece.ids)
            ids[row:stop], positions[row:stop], limits[row:stop] = piece.ids, piece.positions, piece.limits
            slots[row:stop] = piece.adapter
            host["table"][index, : len(piece.text.pages)] = piece.text.pages
            facts.append((piece.text.length, row, stop - row))
            blocks += [
                (index, first, min(self.block_rows, stop - first)) for first in range(row, stop, self.block_rows)
            ]
            row = stop
        host["moves"][: len(moves)] = np.array(moves, dtype=np.int32).reshape(-1, 4)
        host["moves"][len(moves) :] = 0
        known = np.array(facts, dtype=np.int32).reshape(-1, 3)
        host["pieces"][: len(facts)] = known
        host["blocks"][: len(blocks)] = np.array(blocks, dtype=np.int32).reshape(-1, 3)
        host["blocks"][len(blocks) :] = 0
        which = np.repeat(np.arange(len(facts)), known[:, 2])
        places = np.arange(row) - known[which, 1] + known[which, 0]
        host["pages"][:row] = host["table"][which, places // self._page]
        host["offsets"][:row] = places % self._page
        # What fills the forward up goes to the page that nobody reads.
        ids[row:], positions[row:], limits[row:], slots[row:], host["pages"][row:] = 0, 0, 0, 0, 0
        host["offsets"][row:] = np.arange(self.rows - row) % self._page
        self.buffer.copy_(self._pinned, non_blocking=True)


class _Step(NamedTuple):
    """What attention and adapters ask of the forward in progress."""

    plan: Plan
    slab: torch.Tensor
    own_columns: torch.Tensor | None


@torch.library.custom_op("flexspec::attend", mutates_args=())
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`attention.attend` on CUDA. To a compiler it is a function: nobody else touches the pool in a forward."""
    step: _Step = current()
    kernels.store(key, value, step.slab, layer, step.plan)
    return kernels.attend(query, step.slab, layer, scaling, step.plan)


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, scaling: float) -> torch.Tensor:
    _, heads, rows, size = query.shape
    return query.new_empty(1, rows, heads, size)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


def _on_its_gpu(method: Callable[..., T]) -> Callable[..., T]:
    """A thread's current GPU is the first, and kernels, streams and graphs go to the current one."""

    @functools.wraps(method)
    def there(runner: GraphRunner, *arguments: Any) -> T:
        with torch.cuda.device(runner.shape.device):
            return method(runner, *arguments)

    return there


class GraphRunner(Runner):
    """One model and its adapters on CUDA.

    Args:
        context: longest text.
        team: of processes that hold the other shards of the model; it follows in every forward.
        exact: every forward has one size, so that a row's result cannot depend on what else is in it; siblings are not
            scored then, as they do not lie where a text's own keys would.
        compiled: lets torch fuse what stands between the products of a layer, once for each size of a forward.
    """

    def __init__(
        self, model: Any, context: int, exact: bool = False, compiled: bool = False, team: Team | None = None
    ) -> None:
        super().__init__(model, team.size if team else 1)
        self._team = team
        self.exact = exact
        self._sizes = (EXACT_ROWS,) if exact else SIZES
        self.most_rows, self.most_pieces = self._sizes[-1], min(MOST_PIECES, self._sizes[-1])
        self.prompt_rows = EXACT_ROWS if exact else 512
        config = model.config
        group = config.num_attention_heads // (self.shape.heads * (team.size if team else 1))
        self._plans = {rows: Plan(rows, context, group, self.shape.device) for rows in self._sizes}
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._arrangement = -1
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                # On the device, and no constant: every layer is the same code then.
                number = torch.tensor(module.layer_idx, dtype=torch.int32, device=self.shape.device)
                module.register_buffer("layer_number", number, persistent=False)

        if compiled:
            for layer in next(
                part
                for part in model.modules()
                if isinstance(part, torch.nn.ModuleList) and len(part) == config.num_hidden_layers
            ):
                layer.compile(dynamic=False)

    @_on_its_gpu
    def warm(self, pool: Pool) -> None:
        for rows in self._sizes:
            self._plans[rows].fill([])
            if self._team:
                self._team.lead("replay", rows, self._plans[rows].buffer)
            self.replay(pool, rows)

    @_on_its_gpu
    @torch.inference_mode()
    def run(self, pool: Pool, pieces: Sequence[Piece]) -> list[Chosen | None]:
        rows = self._planned(pool, pieces, "replay")
        logits = self.replay(pool, rows)
        asked = [(piece.sampling or GREEDY, [place + 1 for place in piece.positions]) for piece in pieces]
        tokens, margins = choose(logits, Warping.of(asked, logits.device, rows)).tolist()
        chosen: list[Chosen | None] = []
        start = 0
        for piece in pieces:
            rows = range(start, start + len(piece))
            chosen.append([Choice(int(tokens[row]), margins[row]) for row in rows] if piece.sampling else None)
            start += len(piece)
        return chosen

    @_on_its_gpu
    @torch.inference_mode()
    def logits(self, pool: Pool, pieces: Sequence[Piece]) -> tuple[torch.Tensor, ...]:
        rows = self._planned(pool, pieces, "forward")
        logits = self.forward(pool, rows).float()
        # The plan's page of host memory may be written again only when it has been read.
        torch.cuda.synchronize()
        parts = logits[: sum(map(len, pieces))].split([len(piece) for piece in pieces])
        return tuple(part for part, piece in zip(parts, pieces, strict=True) if piece.sampling)

    def _planned(self, pool: Pool, pieces: Sequence[Piece], way: str) -> int:
        """Fills the plan of the smallest forward that holds the pieces, and tells the team; its rows."""
        for piece in pieces:
            pool.reserve(piece.text, piece.text.length + len(piece))
        moves = pool.moves()
        # Texts that go on in a forward after the next may have moves in this one.
        wanted = max(sum(map(len, pieces)), len(moves))
        rows = next(size for size in self._sizes if size >= wanted)
        self._plans[rows].fill(pieces, moves)
        if self._team:
            self._team.lead(way, rows, self._plans[rows].buffer)
        return rows

    def follow(self, pool: Pool) -> None:
        """Does what the team's leader does, on this process's shard, until it ends."""
        assert self._team is not None
        while told := self._team.follow(lambda rows: self._plans[rows].buffer):
            getattr(self, told.way)(pool, told.rows)

    def end(self) -> None:
        if self._team and self._team.rank == 0:
            self._team.end()

    def forward(self, pool: Pool, rows: int) -> torch.Tensor:
        """(rows, V) logits of the forward as planned, without a graph."""
        with torch.inference_mode():
            return self._forward(pool, self._plans[rows])

    def replay(self, pool: Pool, rows: int) -> torch.Tensor:
        """(rows, V) logits of the forward as planned. They stay until the next one of this size."""
        if self._arrangement != self.adapters.arrangement:
            # Adapters have moved in memory.
            self._graphs.clear()
            self._arrangement = self.adapters.arrangement
        captured = self._graphs.get((rows, id(pool)))
        if captured is None:
            captured = self._graphs[rows, id(pool)] = self._capture(pool, self._plans[rows])
        captured.graph.replay()
        return captured.logits

    @torch.inference_mode()
    def _capture(self, pool: Pool, plan: Plan) -> _Captured:
        # On an empty plan: a forward moves rows in the pool and writes where they came from, so none may run twice.
        filled = plan.buffer.clone()
        plan.buffer.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(pool, plan)
        torch.cuda.current_stream().wait_stream(stream)
        plan.buffer.copy_(filled)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._forward(pool, plan)
        log.info("captured a forward of %d rows", plan.rows)
        return _Captured(graph, logits)

    def _forward(self, pool: Pool, plan: Plan) -> torch.Tensor:
        kernels.move(pool.slabs[0], plan.moves)
        with running(_Step(plan, pool.slabs[0], self.adapters.own_columns(plan.slots))):
            output = self.model(
                input_ids=plan.ids[None].long(), position_ids=plan.positions[None].long(), use_cache=False
            )
        logits: torch.Tensor = output.logits[0]
        return logits
