"""Small worlds whose times can be computed by hand, and synthetic texts for them."""

from __future__ import annotations

from hypothesis import strategies as st

from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.plan import UNRANKED, Conditions, Outcome, Plan
from edge_runtime.simulation.links import LinkParameters, SteadyLink
from edge_runtime.simulation.recorded_texts import CONTINUATION_TOKENS, RecordedText
from edge_runtime.simulation.verifiers import SimulatedVerifier, VerifierCost
from edge_runtime.simulation.world import World

# A step takes 10 ms, half a round trip 50 ms, a forward 20 ms and 1 ms for each node beyond the first.
STEP, HALF_TRIP, FORWARD, NODE = 0.010, 0.050, 0.020, 0.001
PROMPT = 8


def make_world(
    *,
    step: float = STEP,
    half_trip: float = HALF_TRIP,
    queue: float = 0.0,
    speculates: bool = False,
    overhead: float = 0.0,
) -> World:
    """A world with constant delays, in which bytes take no time."""
    device = DeviceModel(
        step_seconds=step, prefill_seconds=0.0, overhead_seconds=overhead, idle_watts=2.0, busy_watts=7.0,
        radio_watts=1.0, joules_per_byte=0.001,
    )  # fmt: skip
    link = SteadyLink(
        LinkParameters(
            name="constant", radio="wifi", rtt_seconds=2 * half_trip, jitter_seconds=0.0, up_rate=1e15, down_rate=1e15
        ),
        0,
    )
    cost = VerifierCost("constant", ((1, FORWARD), (2, FORWARD + NODE)), queue, 0.001, speculates)
    return World("constant", device, link, SimulatedVerifier(cost, 0))


def make_text(ranks: str, confidence: float = 0.9, continuation: float = 0.5) -> RecordedText:
    """A text by its ranks: `.` is a correct guess, a digit the rank of the correct sibling, `x` none of them."""
    values = [0 if mark == "." else UNRANKED if mark == "x" else int(mark) for mark in ranks]
    return RecordedText(
        target="made-up", temperature=0.0, top_p=1.0, seed=0, prompt=PROMPT,
        confidences=[confidence] * len(values), ranks=values,
        continuations=[[continuation] * CONTINUATION_TOKENS if rank else [] for rank in values],
    )  # fmt: skip


texts = st.builds(make_text, st.text(".......12x", min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 1))
plans = st.builds(
    Plan,
    draft=st.integers(0, 12),
    continuation=st.sampled_from((1, 1, 1, 2, 3, 7, 100)),
    siblings=st.integers(0, 3),
    sibling_confidence=st.floats(0, 1),
    min_confidence=st.sampled_from((0.0, 0.0, 0.5)),
    min_survival=st.floats(0, 1),
    calibration=st.sampled_from(((), (0.1, 0.9), (0.3, 0.5, 0.8, 0.95))),
    draft_ahead=st.integers(0, 6),
    in_flight=st.integers(1, 2),
    shadow=st.booleans(),
)


class CyclingPlanner:
    """Cycles through its plans and records conditions and outcomes."""

    def __init__(self, plans: list[Plan]) -> None:
        self._plans = plans
        self._index = 0
        self.conditions: list[Conditions] = []
        self.outcomes: list[Outcome] = []

    def plan(self, conditions: Conditions) -> Plan:
        self.conditions.append(conditions)
        self._index += 1
        return self._plans[self._index % len(self._plans)]

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
