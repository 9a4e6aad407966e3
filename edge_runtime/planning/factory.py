"""The policies by name: who decides how much to draft."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.baselines import BanditPlanner, HuggingFacePlanner, ThroughputPlanner
from edge_runtime.planning.device_model import Device
from edge_runtime.planning.energy_budget import Budget
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import FIXED, FixedPlanner, Planner
from edge_runtime.protocol.errors import InputError

DEFAULT = "analytic"
NAMES = ("analytic", "learned", "fixed", "hf-dynamic", "genai-ewma", "ucb")


def make_planner(
    name: str,
    objective: Objective,
    device: Device,
    *,
    acceptance: Mapping[str, float] | None = None,
    budget: Budget | None = None,
) -> Planner:
    """The planner called `name`, one of `NAMES`.

    Args:
        objective: what a token should cost least of; only `analytic`, and `learned` where it hands over to that, heed
            the prices of joules and bytes.
        device: what is known of the board beforehand.
        acceptance: share of draft tokens accepted by what it was measured on, as the bundle's manifest says.
        budget: of energy; only `analytic` holds one, and `learned`, which then hands over to that.

    Raises:
        InputError: no policy has this name.
    """
    if name == "analytic":
        return AnalyticPlanner(objective, device, acceptance=acceptance, budget=budget)
    if name == "learned":
        # Only this policy needs onnxruntime, which takes longer to load than all the rest.
        from edge_runtime.planning.learned import LearnedPlanner

        return LearnedPlanner(objective, device, acceptance=acceptance, budget=budget)
    if name == "fixed":
        return FixedPlanner(FIXED)
    if name == "hf-dynamic":
        return HuggingFacePlanner()
    if name == "genai-ewma":
        return ThroughputPlanner()
    if name == "ucb":
        return BanditPlanner(objective)
    raise InputError(f"{name!r} is no policy; there are {', '.join(NAMES)}")
