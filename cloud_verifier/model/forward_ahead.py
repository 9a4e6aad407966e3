"""A forward that is launched before the host knows the tokens of the one before it.

While texts are streamed without drafts, the next forward of each has one row: the token that the present forward
samples, which the device can take from there. So the device goes on while the host reads the tokens, verifies them and
prepares what follows. Texts that end meanwhile leave a row that nobody asks for; where something else is asked for, the
forward was for nothing, but has done no harm: what it wrote lies behind the end of its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import KVCachePool


class PendingTokens:
    """Token ids and margins of the rows of a forward, on their way to the host.

    Args:
        chosen: (2, rows) on the device, see `sampling_kernel.sample_plain`; may be overwritten by later forwards.
    """

    def __init__(self, chosen: torch.Tensor) -> None:
        # With `non_blocking`, a copy to the host goes into pinned memory, which PyTorch keeps for the next ones.
        self._on_host = chosen.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # annotated partly
        self._copied.record()
        self._lists: tuple[list[float], list[float]] | None = None

    def read(self) -> tuple[list[float], list[float]]:
        """Wait for the forward; return ids and margins by row."""
        if self._lists is None:
            self._copied.synchronize()
            ids, margins = self._on_host.tolist()
            self._lists = ids, margins
        return self._lists


def can_go_ahead(segments: Sequence[Segment]) -> bool:
    """Whether all segments are single rows whose tokens the device samples by itself."""
    return all(
        len(segment.ids) == 1 and segment.sampling is not None and segment.sampling.is_plain for segment in segments
    )


class ForwardAhead:
    """A launched forward of the tokens that follow some segments.

    Args:
        pool: the pool that it writes to.
        segments: single rows, whose tokens the forward takes as its own rows.
        rows, tokens: where the tokens after the segments are, in the forward before.
        chosen: (2, rows), what this forward samples.
    """

    def __init__(
        self,
        pool: KVCachePool,
        segments: Sequence[Segment],
        rows: Sequence[int],
        tokens: PendingTokens,
        chosen: torch.Tensor,
    ) -> None:
        self.chosen = chosen
        self.tokens = PendingTokens(chosen)
        self._pool = pool
        self._previous_tokens = tokens
        self._expected = {
            id(segment.sequence): (own_row, row, segment.sequence.length + 1, segment)
            for own_row, (segment, row) in enumerate(zip(segments, rows, strict=True))
        }

    def rows_of(self, pool: KVCachePool, segments: Sequence[Segment]) -> list[int] | None:
        """The rows of this forward that are `segments`; None if it has not computed all of them."""
        if pool is not self._pool or not can_go_ahead(segments):
            return None
        ids, _ = self._previous_tokens.read()
        rows = []
        for segment in segments:
            own_row, row, length, previous = self._expected.get(id(segment.sequence), (0, 0, -1, segment))
            assert segment.sampling and previous.sampling
            expected = length, int(ids[row]), previous.adapter_slot
            if (segment.sequence.length, segment.ids[0], segment.adapter_slot) != expected:
                return None
            # Those of a session are one object, which does not change.
            if segment.sampling.parameters is not previous.sampling.parameters:
                return None
            rows.append(own_row)
        return rows
