"""Attention on a GPU, as the operator `flexspec::attend`: by the paged kernels, and for long chunks by flash attention.

It is an operator so that torch.compile does not look into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cloud_verifier.model import kernels
from cloud_verifier.model.attention import get_forward_context
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.chunk_attention import PrefillChunk, attend_chunk, flash_takes
from cloud_verifier.model.graph_inputs import GraphInputs
from cloud_verifier.model.kv_cache import round_to


class GraphContext(NamedTuple):
    """Forward context (see `attention.set_forward_context`) on CUDA.

    Attributes:
        rows: of the forward, the first ones of `inputs`.
        chunks: segments whose attention is that of `chunk_attention`, where a layer's can be. All others are before.
    """

    inputs: GraphInputs
    rows: int
    slab: torch.Tensor
    lora_mask: torch.Tensor | None
    chunks: Sequence[PrefillChunk] = ()

    def long_rope_rows(self, _: Callable[[Segment], list[bool]]) -> torch.Tensor:
        return self.inputs.long_rope[: self.rows] != 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Attention of one layer; see `kernels.attend` for `options`."""
        key, value = round_to(key, self.slab.dtype), round_to(value, self.slab.dtype)
        kernels.store(key, value, self.slab, layer, self.inputs)
        flash = bool(self.chunks) and flash_takes(query, value, options["span"], options["softcap"], options["sinks"])
        rows = self.chunks[0].first if flash else self.rows
        parts: list[torch.Tensor] = []
        if rows:
            options |= {"kv_heads": key.shape[1], "value_size": value.shape[3], "without_chunks": flash}
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


# To torch.compile it is a pure function although it writes to the pool: nothing else uses the pool in a forward. The
# checks of `torch.library.custom_op`, which would define it as well, take 0.7 ms a layer. Torch annotates it partly.
_OPERATORS: Any = torch.library.Library("flexspec", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor layer, float scaling, int span, bool chunked, "
    "float softcap, Tensor? sinks) -> Tensor"
)


@torch.library.impl(_OPERATORS, "attend", "CUDA")
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
    """`attention.attend` on CUDA."""
    context: GraphContext = get_forward_context()
    return context.attend(
        query, key, value, layer, scaling=scaling, span=span, chunked=chunked, softcap=softcap, sinks=sinks
    )


@torch.library.register_fake("flexspec::attend", lib=_OPERATORS)  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
