"""Models the speed that measured acceptance gives on a board, with the link, verifier and device models of `simulate`.

Only fixed plans are simulated, because the draft's confidences after its own rejected tokens were not measured. The
planner, which stops early and drafts ahead, is at least about as good as the best fixed plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloud_verifier.acceptance.bootstrap import Bootstrap, Interval
from edge_runtime.planning.board_profile import BoardProfile, find_profile
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.simulation import RecordedText, Simulator, World, make_verifier, parse_link
from export.evaluate.proposers import Proposer

CLOUD_ALONE = "cloud alone"
# Longer than any text: the cloud streams all of it in one round.
ALL_TOKENS = 1 << 20


@dataclass(frozen=True)
class SimulatedDeployment:
    """Board, link and verifier that speed is modeled for; names as `edge-runtime simulate` takes them."""

    profile: str
    link: str = "wifi"
    verifier: str = "loaded"

    def __post_init__(self) -> None:
        """Raises InputError if one of the names is unknown."""
        find_profile(self.profile)
        parse_link(self.link, 0)
        make_verifier(self.verifier, 0)

    @property
    def name(self) -> str:
        """Name for tables and messages."""
        return f"{self.profile}, {self.link}, {self.verifier}"


@dataclass(frozen=True)
class ModeledSpeed:
    """Modeled latency of one deployment.

    Attributes:
        scene: name of the deployment.
        step_milliseconds: one decode step of the draft on that board after an empty text.
        milliseconds: per token, by plan: `CLOUD_ALONE`, `K=4`, or `K=4 +3` with three siblings.
        best: the fastest plan.
    """

    scene: str
    step_milliseconds: float
    milliseconds: dict[str, Interval]
    best: str


def model_speed(
    deployment: SimulatedDeployment,
    draft: Proposer,
    texts: list[RecordedText],
    *,
    lengths: tuple[int, ...],
    siblings: int,
    bootstrap: Bootstrap,
) -> ModeledSpeed | None:
    """Simulate fixed plans over `texts`; None if the draft's size is unknown or there are no texts.

    Args:
        lengths: draft lengths K; each is simulated with and without `siblings`.
    """
    if not draft.weight_bytes or not texts:
        return None
    profile: BoardProfile = find_profile(deployment.profile)
    plans = {CLOUD_ALONE: Plan(0, continuation=ALL_TOKENS)}
    for length in lengths:
        plans[f"K={length}"] = Plan(length)
        plans[f"K={length} +{siblings}"] = Plan(length, siblings=siblings, sibling_confidence=1.0)
    milliseconds: dict[str, Interval] = {}
    for name, plan in plans.items():
        link = parse_link(deployment.link, 0)
        device = DeviceModel.from_profile(profile, draft.weight_bytes, radio=link.radio, cache_bytes=draft.cache_bytes)
        world = World(deployment.name, device, link, make_verifier(deployment.verifier, 1), 2)
        results = Simulator(world, FixedPlanner(plan)).run_all(texts)
        interval = bootstrap.ratio([(1e3 * result.latency_seconds, result.tokens) for result in results])
        assert interval is not None
        milliseconds[name] = interval
    return ModeledSpeed(
        scene=deployment.name,
        step_milliseconds=round(1e3 * device.step_seconds, 3),
        milliseconds=milliseconds,
        best=min(milliseconds, key=lambda name: milliseconds[name].value),
    )
