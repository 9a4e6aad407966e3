"""Runs the two kinds of ONNX draft graph with a KV cache that can be rolled back.

    fused    onnxruntime-genai's graph (GroupQueryAttention). One buffer is bound as past and as present, so a step
             writes in place and a rollback only decrements a length.
    concat   optimum's graph. Every step returns the whole cache, longer by the new tokens; a rollback slices it.

`detect_graph_kind` tells them apart by the names of the graph's inputs and of their axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_runtime.planning.round_rules import PREFILL_CHUNK_TOKENS
from edge_runtime.protocol.bundle import Architecture

# Initial KV cache capacity of the fused graph, doubled on demand. Chosen.
INITIAL_CAPACITY_TOKENS = 64

Logits = npt.NDArray[np.float32]


class OnnxRunner(ABC):
    """The KV cache of one text, on a session that all texts share.

    Attributes:
        length: tokens in the cache.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self.length = 0
        self._session = session
        self._input_names = [node.name for node in session.get_inputs()]
        self._past_names = [name for name in self._input_names if name.startswith("past_key_values.")]

    def append(self, ids: list[int]) -> Logits:
        """Run the graph on `ids` (at least one). Returns the last logits, (n,), valid until the next call."""
        for start in range(0, len(ids), PREFILL_CHUNK_TOKENS):
            chunk = ids[start : start + PREFILL_CHUNK_TOKENS]
            logits = self._step(chunk)
            self.length += len(chunk)
        return logits

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the cache in bytes."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""

    @abstractmethod
    def copy_prefix(self, length: int) -> OnnxRunner:
        """A runner of its own whose cache holds the first `length` tokens."""

    @abstractmethod
    def _step(self, ids: list[int]) -> Logits:
        """Run the graph once on `ids`."""


def make_runner(session: ort.InferenceSession, architecture: Architecture) -> OnnxRunner:
    """Create a runner with an empty KV cache on `session`."""
    return (FusedRunner if detect_graph_kind(session) == "fused" else ConcatRunner)(session, architecture)


def detect_graph_kind(session: ort.InferenceSession) -> str:
    """Return `fused` or `concat`.

    The fused graph takes no `position_ids`: it derives positions from the length of its attention mask, whose axis is
    named `total_sequence_length`. Optimum's graph takes `position_ids`, except for Gemma, where the name of the mask's
    axis is a sum of other names.
    """
    shapes = {node.name: node.shape for node in session.get_inputs()}
    has_total_length = shapes["attention_mask"][1] == "total_sequence_length"
    return "fused" if has_total_length and "position_ids" not in shapes else "concat"


def logits_width(session: ort.InferenceSession) -> int | None:
    """Return the number of ids the logits cover; None if the graph leaves that axis open."""
    width = next(node.shape[-1] for node in session.get_outputs() if node.name == "logits")
    return width if isinstance(width, int) else None


class FusedRunner(OnnxRunner):
    """One preallocated buffer per key and value, (1, kv_heads, capacity, head_dim), bound as past and as present."""

    def __init__(self, session: ort.InferenceSession, architecture: Architecture) -> None:
        super().__init__(session)
        self._architecture = architecture
        self._binding = session.io_binding()
        self._buffers: list[npt.NDArray[np.float32]] = []
        self._mask = np.empty((1, 0), np.int64)
        # One row: the graph computes the head for the last position only.
        width = logits_width(session) or architecture.vocabulary_size
        self._logits = np.empty((1, 1, width), np.float32)
        self._bind(self._binding.bind_output, "logits", self._logits)
        self._grow(min(INITIAL_CAPACITY_TOKENS, architecture.context))

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def truncate(self, length: int) -> None:
        self.length = length

    def copy_prefix(self, length: int) -> FusedRunner:
        other = FusedRunner(self._session, self._architecture)
        if length > other._mask.shape[1]:
            other._grow(self._mask.shape[1])
        for buffer, copied in zip(self._buffers, other._buffers, strict=True):
            copied[:, :, :length] = buffer[:, :, :length]
        other.length = length
        return other

    def _step(self, ids: list[int]) -> Logits:
        total = self.length + len(ids)
        if total > self._mask.shape[1]:
            self._grow(min(max(total, 2 * self._mask.shape[1]), self._architecture.context))
        tokens = np.array([ids], np.int64)
        self._bind(self._binding.bind_input, "input_ids", tokens)
        # The graph takes the text's length from the length of the mask; the mask itself is all ones.
        self._bind(self._binding.bind_input, "attention_mask", self._mask[:, :total])
        self._session.run_with_iobinding(self._binding)
        row: Logits = self._logits[0, 0]
        return row

    def _grow(self, capacity: int) -> None:
        shape = (1, self._architecture.kv_heads, capacity, self._architecture.head_dim)
        self._mask = np.ones((1, capacity), np.int64)
        for index, name in enumerate(self._past_names):
            buffer = np.zeros(shape, np.float32)
            if index < len(self._buffers):
                buffer[:, :, : self.length] = self._buffers[index][:, :, : self.length]
                self._buffers[index] = buffer
            else:
                self._buffers.append(buffer)
            self._bind(self._binding.bind_input, name, buffer)
            self._bind(self._binding.bind_output, name.replace("past_key_values", "present"), buffer)

    def _bind(
        self, bind: Callable[..., None], name: str, array: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    ) -> None:
        """Bind `array` with `bind`, the binding's `bind_input` or `bind_output`."""
        bind(name, "cpu", 0, element_type=array.dtype.type, shape=array.shape, buffer_ptr=array.ctypes.data)


class ConcatRunner(OnnxRunner):
    """The KV cache as the arrays that the last step returned."""

    def __init__(self, session: ort.InferenceSession, architecture: Architecture) -> None:
        super().__init__(session)
        self._architecture = architecture
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past_names)]
        empty = np.empty((1, architecture.kv_heads, 0, architecture.head_dim), np.float32)
        self._past = [empty] * len(self._past_names)

    @property
    def nbytes(self) -> int:
        # A truncated array is a view that keeps the whole one.
        wholes = (past.base if isinstance(past.base, np.ndarray) else past for past in self._past)
        return sum(whole.nbytes for whole in wholes)

    def truncate(self, length: int) -> None:
        self._past = [past[:, :, :length] for past in self._past]
        self.length = length

    def copy_prefix(self, length: int) -> ConcatRunner:
        other = ConcatRunner(self._session, self._architecture)
        # The arrays themselves are never written.
        other._past = [past[:, :, :length] for past in self._past]
        other.length = length
        return other

    def _step(self, ids: list[int]) -> Logits:
        total = self.length + len(ids)
        feeds = dict(zip(self._past_names, self._past, strict=True))
        feeds["input_ids"] = np.array([ids], np.int64)
        feeds["attention_mask"] = np.ones((1, total), np.int64)
        if "position_ids" in self._input_names:
            feeds["position_ids"] = np.arange(self.length, total, dtype=np.int64)[None]
        logits, *self._past = self._session.run(self._outputs, feeds)
        row: Logits = logits[0, -1]
        return row
