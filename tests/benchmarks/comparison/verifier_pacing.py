"""Real forwards of targets that take the time of a modeled verifier; see `pacing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cloud_verifier.model.runner import TargetRunner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.simulation.verifiers import VERIFIERS, SimulatedVerifier
from tests.benchmarks.comparison.pacing import DraftPace, PaceCounts


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

    def install(self) -> None:
        """Apply to all runners of targets, and to the drafts of this process."""
        self._draft.install()
        methods: list[tuple[type[TargetRunner], str]] = [(TargetRunner, "logits")]
        if torch.cuda.is_available():
            from cloud_verifier.model.cuda_graphs import GraphRunner

            # A forward that samples in its graph does not go through `logits`.
            methods += (GraphRunner, "logits"), (GraphRunner, "run")
        for runner_class, name in methods:
            setattr(runner_class, name, self._slow_down(getattr(runner_class, name)))

    def _slow_down(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def paced(runner: Any, pool: Any, segments: Sequence[Any]) -> Any:
            started = time.perf_counter()
            result = compute(runner, pool, segments)
            rows = sum(len(segment) for segment in segments if segment.sampling)
            if self._verifier and rows:
                times = self._verifier.forward_seconds
                self.counts.sleep_rest(started, times[min(rows, len(times) - 1)])
            return result

        return paced
