"""What measured acceptance would come to on a board: modelled link, verifier and device, as `edge-runtime simulate`.

Only fixed plans are played, for what a draft is sure of behind its own mistakes was not measured; the planner, which
stops early and drafts ahead, is at least about as good as the best of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloud_verifier.acceptance.bootstrap import Bootstrap, Interval
from edge_runtime.planning.board_profile import Profile, find_profile
from edge_runtime.planning.device_model import Device
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.simulation.links import parse_link
from edge_runtime.simulation.recorded_texts import Text
from edge_runtime.simulation.simulator import Simulator
from edge_runtime.simulation.verifiers import verifier
from edge_runtime.simulation.world import World
from export.evaluate.proposers import Draft

STREAMED = "cloud alone"
# More than any text.
ALL = 1 << 20


@dataclass(frozen=True)
class Scene:
    """Where a draft is to be used; names as `edge-runtime simulate` takes them."""

    profile: str
    link: str = "wifi"
    verifier: str = "loaded"

    def __post_init__(self) -> None:
        """Raises InputError where one of the names is unknown."""
        find_profile(self.profile)
        parse_link(self.link, 0)
        verifier(self.verifier, 0)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.profile}, {self.link}, {self.verifier}"


@dataclass(frozen=True)
class Speed:
    """Modelled latency of a scene.

    Attributes:
        scene: which.
        step_milliseconds: one step of the draft on that board behind an empty text.
        milliseconds: per token, by plan: `STREAMED`, `K=4`, or `K=4 +3` with three siblings.
        best: the fastest of the plans.
    """

    scene: str
    step_milliseconds: float
    milliseconds: dict[str, Interval]
    best: str


def speed(
    scene: Scene, draft: Draft, texts: list[Text], lengths: tuple[int, ...], siblings: int, bootstrap: Bootstrap
) -> Speed | None:
    """Plays fixed plans over `texts`; None where the draft's size, or every text, is unknown."""
    if not draft.weight_bytes or not texts:
        return None
    profile: Profile = find_profile(scene.profile)
    plans = {STREAMED: Plan(0, own=ALL)}
    for length in lengths:
        plans[f"K={length}"] = Plan(length)
        plans[f"K={length} +{siblings}"] = Plan(length, siblings=siblings, sibling_confidence=1.0)
    device, found = None, {}
    for name, plan in plans.items():
        link = parse_link(scene.link, 0)
        device = Device.of(profile, draft.weight_bytes, radio=link.radio, cache_bytes=draft.cache_bytes)
        world = World(scene.name, device, link, verifier(scene.verifier, 1), 2)
        results = Simulator(world, FixedPlanner(plan)).play_all(texts)
        figure = bootstrap.ratio([(1e3 * result.latency_seconds, result.tokens) for result in results])
        assert figure is not None
        found[name] = figure
    assert device is not None
    best = min(found, key=lambda name: found[name].value)
    return Speed(scene.name, round(1e3 * device.step_seconds, 3), found, best)
