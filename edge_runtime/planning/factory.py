"""Creates planners by policy name."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.baselines import BanditPlanner, HuggingFacePlanner, ThroughputPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner, Planner
from edge_runtime.protocol.errors import InputError

DEFAULT_POLICY = "analytic"
POLICY_NAMES = ("analytic", "learned", "fixed", "hf-dynamic", "genai-ewma", "ucb")


def make_planner(
    name: str,
    objective: Objective,
    device: DeviceModel,
    *,
    acceptance: Mapping[str, float] | None = None,
    budget: EnergyBudget | None = None,
) -> Planner:
    """Create the planner called `name`, one of `POLICY_NAMES`.

    Args:
        objective: prices. Only `analytic` considers the prices of joules and bytes; so does `learned` where it falls
            back to it.
        device: prior figures of the board.
        acceptance: acceptance rates by evaluation, as in the bundle's manifest.
        budget: energy budget. Only `analytic` enforces one; `learned` falls back to it if a budget is given.

    Raises:
        InputError: there is no such policy.
    """
    if name == "analytic":
        return AnalyticPlanner(objective, device, acceptance=acceptance, budget=budget)
    if name == "learned":
        # Imported here because only this policy needs onnxruntime, which takes longer to import than all the rest.
        from edge_runtime.planning.learned import LearnedPlanner

        return LearnedPlanner(objective, device, acceptance=acceptance, budget=budget)
    if name == "fixed":
        return FixedPlanner(FIXED_PLAN)
    if name == "hf-dynamic":
        return HuggingFacePlanner()
    if name == "genai-ewma":
        return ThroughputPlanner()
    if name == "ucb":
        return BanditPlanner(objective)
    raise InputError(f"{name!r} is not a policy: use one of {', '.join(POLICY_NAMES)}")
