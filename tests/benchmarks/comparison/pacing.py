"""Real forwards that take the time of another machine: the forward runs, and the rest of the time is slept.

Here those of drafts; those of targets are in `verifier_pacing`.

Where the real forward takes longer than the modeled one, nothing can be slept; what it takes longer is counted as late.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

import edge_runtime.draft.model as draft_model
from edge_runtime.draft.onnx_runner import Logits, OnnxRunner, make_runner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.protocol.bundle import Architecture


class PaceCounts(msgspec.Struct):
    """Forwards so far, and by how much they took longer than modeled, all together."""

    forwards: int = 0
    late_seconds: float = 0.0

    def sleep_rest(self, started: float, seconds: float) -> None:
        """Sleep until `seconds` have passed since `started` (`time.perf_counter`); count a forward if any are due."""
        if not seconds:
            return
        rest = started + seconds - time.perf_counter()
        self.forwards += 1
        self.late_seconds += max(0.0, -rest)
        if rest > 0:
            time.sleep(rest)


class DraftPace:
    """Makes the draft model of this process as slow as that of a board; `device` is None for its own speed."""

    def __init__(self) -> None:
        self.device: DeviceModel | None = None
        self.counts = PaceCounts()

    def install(self) -> None:
        """Apply to all drafts that this process creates from now on."""
        draft_model.make_runner = self.make_runner  # type: ignore[attr-defined]

    def make_runner(self, session: Any, architecture: Architecture) -> OnnxRunner:
        """Replaces `onnx_runner.make_runner`."""
        return self._slow_down(make_runner(session, architecture))

    def _slow_down(self, runner: OnnxRunner) -> OnnxRunner:
        append, copy_prefix = runner.append, runner.copy_prefix

        def paced_append(ids: list[int]) -> Logits:
            started, length = time.perf_counter(), runner.length
            logits = append(ids)
            if self.device:
                seconds = max(self.device.step_at(length), len(ids) * self.device.prefill_seconds)
                self.counts.sleep_rest(started, seconds)
            return logits

        runner.append = paced_append  # type: ignore[method-assign]
        runner.copy_prefix = lambda length: self._slow_down(copy_prefix(length))  # type: ignore[method-assign]
        return runner
