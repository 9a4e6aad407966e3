"""Running the two kinds of ONNX graph token by token: how keys and values are held, and how they are rolled back.

    fused    onnxruntime-genai's graph (GroupQueryAttention): one buffer is past and present at once, so a step writes
             in place, and rolling back changes a number
    concat   optimum's graph: every step returns the whole cache, longer by one; rolling back slices it

The names of the graph's inputs and of their axes tell which it is (see `graph_kind`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_runtime.protocol.bundle import Architecture

# Prompts go through in pieces: the working memory of a piece, not of the prompt, is what a board must have.
PREFILL_PIECE = 128
FIRST_CAPACITY = 256

Logits = npt.NDArray[np.float32]


class Runner(Protocol):
    """Keys and values of one text, on a shared session."""

    length: int

    def append(self, ids: list[int]) -> Logits:
        """Puts `ids` (at least one) behind the text. Returns the last logits, (n,), valid until the next call."""

    def truncate(self, length: int) -> None:
        """Forgets everything behind the first `length` tokens."""


def make_runner(session: ort.InferenceSession, architecture: Architecture) -> Runner:
    """A runner for an empty text on `session`."""
    if graph_kind(session) == "fused":
        return FusedRunner(session, architecture)
    return ConcatRunner(session, architecture)


def graph_kind(session: ort.InferenceSession) -> str:
    """`fused` or `concat`: the fused graph takes no positions, and counts them by the length of its mask.

    Optimum's graph takes `position_ids`, except for Gemma; its mask's axis is a sum by name.
    """
    axes = {node.name: node.shape for node in session.get_inputs()}
    counts_by_mask = axes["attention_mask"][1] == "total_sequence_length"
    return "fused" if counts_by_mask and "position_ids" not in axes else "concat"


def logits_width(session: ort.InferenceSession) -> int | None:
    """How many ids the logits are of; None where the graph leaves it open."""
    width = next(node.shape[-1] for node in session.get_outputs() if node.name == "logits")
    return width if isinstance(width, int) else None


class FusedRunner:
    """One preallocated buffer per key and value, (1, kv_heads, capacity, head_dim), bound as past and as present."""

    def __init__(self, session: ort.InferenceSession, architecture: Architecture) -> None:
        self.length = 0
        self._session = session
        self._shape = architecture
        self._binding = session.io_binding()
        self._past_names = [n.name for n in session.get_inputs() if n.name.startswith("past_key_values.")]
        self._buffers: list[npt.NDArray[np.float32]] = []
        self._mask = np.empty((1, 0), np.int64)
        # The bound logits are one row: the graph computes the head for the last position only.
        width = logits_width(session) or architecture.vocabulary_size
        self._logits = np.empty((1, 1, width), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        self._grow(min(FIRST_CAPACITY, architecture.context))

    def append(self, ids: list[int]) -> Logits:
        for start in range(0, len(ids), PREFILL_PIECE):
            self._step(ids[start : start + PREFILL_PIECE])
        row: Logits = self._logits[0, 0]
        return row

    def truncate(self, length: int) -> None:
        self.length = length

    def _step(self, ids: list[int]) -> None:
        total = self.length + len(ids)
        if total > self._mask.shape[1]:
            self._grow(min(max(total, 2 * self._mask.shape[1]), self._shape.context))
        tokens = np.array([ids], np.int64)
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, tokens.shape, tokens.ctypes.data)
        # The mask's length is what tells the graph where the text ends; the mask itself is all ones.
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.length = total

    def _grow(self, capacity: int) -> None:
        shape = (1, self._shape.kv_heads, capacity, self._shape.head_dim)
        self._mask = np.ones((1, capacity), np.int64)
        for index, name in enumerate(self._past_names):
            buffer = np.zeros(shape, np.float32)
            if index < len(self._buffers):
                buffer[:, :, : self.length] = self._buffers[index][:, :, : self.length]
                self._buffers[index] = buffer
            else:
                self._buffers.append(buffer)
            present = name.replace("past_key_values", "present")
            self._binding.bind_input(name, "cpu", 0, np.float32, shape, buffer.ctypes.data)
            self._binding.bind_output(present, "cpu", 0, np.float32, shape, buffer.ctypes.data)


class ConcatRunner:
    """The cache as the arrays that the last step returned."""

    def __init__(self, session: ort.InferenceSession, architecture: Architecture) -> None:
        self.length = 0
        self._session = session
        names = [node.name for node in session.get_inputs()]
        self._past_names = [name for name in names if name.startswith("past_key_values.")]
        self._takes_positions = "position_ids" in names
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past_names)]
        empty = np.empty((1, architecture.kv_heads, 0, architecture.head_dim), np.float32)
        self._past = [empty] * len(self._past_names)

    def append(self, ids: list[int]) -> Logits:
        for start in range(0, len(ids), PREFILL_PIECE):
            logits = self._step(ids[start : start + PREFILL_PIECE])
        return logits

    def truncate(self, length: int) -> None:
        self._past = [past[:, :, :length] for past in self._past]
        self.length = length

    def _step(self, ids: list[int]) -> Logits:
        total = self.length + len(ids)
        feeds = dict(zip(self._past_names, self._past, strict=True))
        feeds["input_ids"] = np.array([ids], np.int64)
        feeds["attention_mask"] = np.ones((1, total), np.int64)
        if self._takes_positions:
            feeds["position_ids"] = np.arange(self.length, total, dtype=np.int64)[None]
        logits, *self._past = self._session.run(self._outputs, feeds)
        self.length = total
        row: Logits = logits[0, -1]
        return row
