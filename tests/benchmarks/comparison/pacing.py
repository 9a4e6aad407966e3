"""Real forwards that take the time of another machine: the forward runs, and the rest of the time is slept.

Where the real forward takes longer than the modeled one, nothing can be slept; such forwards are counted as late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

import edge_runtime.draft.model as draft_model
from edge_runtime.draft.onnx_runner import Logits, OnnxRunner, make_runner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.protocol.bundle import Architecture
from edge_runtime.simulation.verifiers import VERIFIERS, SimulatedVerifier

# A forward is late if it takes this much longer than modeled. Chosen: what moves a median is more.
TOLERANCE = 1.05


class PaceCounts(msgspec.Struct):
    """Forwards so far, and how many of them took longer than modeled."""

    forwards: int = 0
    late: int = 0

    def sleep_rest(self, started: float, seconds: float) -> None:
        """Sleep until `seconds` have passed since `started` (`time.perf_counter`); count a forward if any are due."""
        if not seconds:
            return
        rest = started + seconds - time.perf_counter()
        self.forwards += 1
        self.late += rest < seconds * (1 - TOLERANCE)
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


class VerifierPace:
    """Makes the target's forwards, and the draft beside it, take the time of a modeled verifier.

    Prefill is not modeled: a forward without rows to verify takes its own time.
    """

    def __init__(self) -> None:
        self.counts = PaceCounts()
        self._verifier: SimulatedVerifier | None = None
        self._draft = DraftPace()

    def set_verifier(self, name: str) -> None:
        """Take the times of a verifier of `simulation.verifiers`; an empty name stands for this machine's own."""
        self._verifier = SimulatedVerifier(VERIFIERS[name], 0) if name else None
        step = VERIFIERS[name].draft_seconds if name else 0.0
        self._draft.device = DeviceModel(step_seconds=step, prefill_seconds=0.0) if name else None

    def install(self, runner_class: Any) -> None:
        """Apply to all runners of a class: `model.runner.TargetRunner`, or that of a GPU."""
        self._draft.install()
        compute: Callable[..., tuple[torch.Tensor, ...]] = runner_class.logits

        def paced_logits(runner: Any, pool: Any, segments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
            started = time.perf_counter()
            logits = compute(runner, pool, segments)
            rows = sum(len(segment) for segment in segments if segment.sampling)
            if self._verifier and rows:
                times = self._verifier.forward_seconds
                self.counts.sleep_rest(started, times[min(rows, len(times) - 1)])
            return logits

        runner_class.logits = paced_logits
