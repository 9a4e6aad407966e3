"""A board with a draft of known acceptance and a verifier of known speed: what the planner ventures, cold and warm.

Draft, loop, link and verifier are real; only some draft tokens are replaced by wrong ones, and every forward of the
target takes longer. The clock of a busy machine proves nothing, so these tests assert what the planner does with its
budget; `planning/test_regret_bound.py` compares with streaming on a simulated clock.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.cli.planner_state import PlannerStateStore
from edge_runtime.decoding import Generation
from edge_runtime.draft.model import DraftContext, OnnxDraft
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.planning.planner_state import PlannerState
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier import VerifierClient
from tests.conftest import serving

SLOW, FAST = 0.060, 0.008
TEXTS = ("def read_config(path):\n", "import os\n\n\nclass Cache:\n", "def main() -> int:\n")
TOKENS = 16
SAMPLING = Sampling(0.7, seed=1, ignore_eos=True)


class CorruptedDraft(OnnxDraft):
    """A draft model, a share of whose tokens is replaced by wrong ones, with confidence unchanged."""

    def __init__(self, draft: OnnxDraft, share: float) -> None:
        vars(self).update(vars(draft))
        self.share = share

    def new_context(self) -> DraftContext:
        context, random = super().new_context(), Random(0)
        draft_token, vocabulary = context._draft_token, self.manifest.architecture.vocabulary_size

        def corrupted(*arguments: Any) -> object:
            drafted = draft_token(*arguments)
            if random.random() >= self.share:
                return drafted
            others = [(token + 1) % vocabulary for token in drafted.siblings]
            return drafted._replace(token=(drafted.token + 1) % vocabulary, siblings=others)

        context._draft_token = corrupted  # type: ignore[method-assign, assignment]
        return context


class WatchedPlanner:
    """Passes everything on to the analytic planner, and records by how much the budget did not cover planned rounds."""

    def __init__(self, planner: AnalyticPlanner) -> None:
        self.planner = planner
        self.uncovered = 0.0

    def plan(self, conditions: Conditions) -> Plan:
        plan = self.planner.plan(conditions)
        if plan.draft:
            # A text that begins now would find what all planned rounds leave.
            left = self.planner.regret.available(Conditions(1, 1, 1, now=conditions.now))
            self.uncovered = max(self.uncovered, -left)
        return plan

    def observe(self, outcome: Outcome) -> None:
        self.planner.observe(outcome)


def slowed(target: Target, seconds: float) -> Target:
    """Return the target with forwards that take `seconds` longer."""
    slow, run = copy.copy(target), target.run

    def run_slowly(*arguments: object) -> object:
        time.sleep(seconds)
        return run(*arguments)  # type: ignore[arg-type]

    slow.run = run_slowly  # type: ignore[method-assign, assignment]
    return slow


async def generate(target: Target, draft: OnnxDraft, planner: WatchedPlanner | None) -> list[list[int]]:
    texts = []
    async with serving(target) as server, VerifierClient(server.url) as client:
        for text in TEXTS:
            ids = draft.tokenizer.encode(text).ids
            generation = Generation(draft, client, ids, SAMPLING, max_new_tokens=TOKENS, planner=planner)
            async for _ in generation:
                pass
            texts.append(generation.ids)
    return texts


def estimated_acceptance(planner: AnalyticPlanner) -> float:
    return planner._acceptance.get("", SAMPLING.temperature).first_stage_table().acceptance


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "share"), [(SLOW, 1.0), (SLOW, 0.8), (FAST, 0.95), (FAST, 0.5)])
async def test_every_drafted_round_is_covered_by_the_budget(
    target_v1: Target, shipped_draft: OnnxDraft, tmp_path: Path, seconds: float, share: float
) -> None:
    draft = CorruptedDraft(shipped_draft, share)
    step, prefill = shipped_draft.measure_speed()
    device = DeviceModel(step_seconds=step, prefill_seconds=prefill, overhead_seconds=0.0)
    texts: list[list[list[int]]] = []
    states: list[PlannerState] = []
    estimates = []
    for _ in range(2):
        planner = AnalyticPlanner(Objective(), device, acceptance={"T=0.7": 0.7})
        store = PlannerStateStore(tmp_path, "draft")
        assert store.restore(planner) == bool(texts)
        if states:
            # The second process continues with the evidence and the budget that the first one left.
            assert planner.state() == states[0]
        estimates.append(estimated_acceptance(planner))
        watched = WatchedPlanner(planner)
        texts.append(await generate(slowed(target_v1, seconds), draft, watched))
        assert watched.uncovered == 0.0
        states.append(planner.state())
        store.save(planner)
    assert texts[0] == texts[1] == await generate(target_v1, shipped_draft, None)
    if share == 1.0:
        # How much of a draft is judged, and so learned, depends on the clock; that it is poor is noticed in any case.
        assert estimates[1] < estimates[0]
