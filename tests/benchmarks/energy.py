"""The energy model against published measurements, and a day on a battery: `python -m tests.benchmarks run energy`.

Computed and simulated; nothing is measured here. Published: tokens per second and watts of language models on the CPU
of a Raspberry Pi 5, whole board. The model is what `device_profiles/boards/raspberry-pi-5.toml` gives for a draft of
the same bytes, idle draw included. Its rate comes from two of the models (marked), its watts from the middle of a range
that covers them, so that the others test it. For the CPU of a Jetson Orin Nano no measurement of joules was found.

The day: answers come and go over a day as people do, on a 4G link; between them the board idles. The planner has an
energy budget until the end of the day, and reads the battery's charge before each answer.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random

import msgspec

from edge_runtime.planning.board_profile import find_profile
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.plan import Conditions, FixedPlanner, Outcome, Plan, Planner
from edge_runtime.simulation.simulator import Simulator
from edge_runtime.simulation.world import SMALL_DRAFT_BYTES, make_world
from tests.benchmarks.harness.benchmark import Benchmark, Quantity, Scenario, Values
from tests.benchmarks.planning import BASELINES, STREAMING, make_policy, read_kind

BOARD, LINK, VERIFIER = "raspberry-pi-5", "4g", "loaded"


class Measurement(msgspec.Struct, frozen=True):
    """A language model on the CPU of a Raspberry Pi 5.

    Attributes:
        source: where it was published.
        gigabytes: of the weights, which every token reads.
        rate: tokens per second.
        watts: highest draw of the board at the wall meanwhile.
    """

    source: str
    gigabytes: float
    rate: float
    watts: float


# Ollama, 4 bits, whose downloads have these sizes.
MEASURED = {
    "Llama 3.2 3B (its rate is the profile's)": Measurement("geerlingguy/ai-benchmarks, issue 7", 2.02, 4.88, 11.9),
    "Llama 3.1 8B": Measurement("geerlingguy/ai-benchmarks, issue 7", 4.92, 2.17, 11.6),
    "Llama 2 13B": Measurement("geerlingguy/ai-benchmarks, issue 7", 7.37, 1.36, 10.9),
    "DeepSeek R1 14B": Measurement("geerlingguy/ai-benchmarks, README", 8.99, 1.20, 13.0),
    "Llama 3.2 3B, Raspberry Pi 500+": Measurement("geerlingguy/ai-benchmarks, issue 24", 2.02, 5.55, 13.0),
}
MEASURED_JOULES = Quantity("measured", "J per token")
MODELED_JOULES = Quantity("modeled", "J per token")
ERROR, RATE_ERROR, WATTS_ERROR = (
    Quantity(f"error of {what}", "%", digits=0) for what in ("joules", "tokens per second", "watts")
)

DAY_SECONDS = 24 * 3600.0
ANSWERS = 4000
# Chosen: between what a day of streaming draws and one of the planner without a budget; idling alone draws 77.
BATTERY_WATT_HOURS = 91.0
CHARGE_LEFT = Quantity("charge at the end of the day", "%", digits=1, goal=0.0, higher_is_better=True)
LASTS = Quantity("lasts", "h", digits=1)
GENERATING_WATTS = Quantity("draw while answering", "W")
PER_TOKEN = Quantity("per token", "ms", digits=1)
DRAFTING = Quantity("time in which the board drafts", "%", digits=1)
WITHOUT, WITH, STREAMED = "planner without budget", "planner with a budget until the end of the day", "streaming"


def compare(measured: Measurement) -> Values:
    """Compare the profile's model with a measurement."""
    profile = find_profile(BOARD)
    assert profile.power is not None
    seconds = profile.draft_seconds(int(measured.gigabytes * 1e9))
    joules = measured.watts / measured.rate
    modeled = seconds * profile.power.busy_watts
    return {
        MEASURED_JOULES.name: joules,
        MODELED_JOULES.name: modeled,
        ERROR.name: 100 * (modeled / joules - 1),
        RATE_ERROR.name: 100 * (1 / (seconds * measured.rate) - 1),
        WATTS_ERROR.name: 100 * (profile.power.busy_watts / measured.watts - 1),
    }


class OnBattery:
    """A planner that is told the charge that was left before the present answer."""

    def __init__(self, planner: Planner) -> None:
        self.joules_left = 0.0
        self._planner = planner

    def plan(self, conditions: Conditions) -> Plan:
        surroundings = msgspec.structs.replace(
            conditions.surroundings, joules_left=max(0.0, self.joules_left), on_battery=True
        )
        return self._planner.plan(msgspec.structs.replace(conditions, surroundings=surroundings))

    def observe(self, outcome: Outcome) -> None:
        self._planner.observe(outcome)


def answer_times(seed: int) -> list[float]:
    """Times of day, in seconds, at which answers are asked for: none at 4 o'clock, most at 16."""
    chance = random.Random(seed)
    times: list[float] = []
    while len(times) < ANSWERS:
        time = chance.uniform(0, DAY_SECONDS)
        if chance.random() < (1 - math.cos(2 * math.pi * (time / 3600 - 4) / 24)) / 2:
            times.append(time)
    return sorted(times)


def simulate_day(how: str, seed: int) -> Values:
    """Simulate a day of answers; a battery that is empty is taken to deliver on, and how long it lasted is kept."""
    texts = [text for temperature in (0.0, 0.7, 1.0) for text in read_kind(("target-v2", temperature))]
    world = make_world(LINK, BOARD, VERIFIER, weight_bytes=SMALL_DRAFT_BYTES, seed=seed)
    budget = EnergyBudget(until=DAY_SECONDS) if how == WITH else None
    policy = FixedPlanner(BASELINES[STREAMING]) if how == STREAMED else make_policy("analytic", world.device, budget)
    planner = OnBattery(policy)
    simulator = Simulator(world, planner)
    capacity, spent = BATTERY_WATT_HOURS * 3600, 0.0
    tokens, seconds, joules, drafting, empty_at = 0, 0.0, 0.0, 0.0, math.inf
    random.Random(seed).shuffle(texts)
    for time, text in zip(answer_times(seed), itertools.cycle(texts), strict=False):
        spent += world.device.idle_watts * max(0.0, time - simulator.now)
        simulator.now = max(simulator.now, time)
        planner.joules_left = capacity - spent
        result = simulator.run(text)
        spent += result.joules
        if spent > capacity:
            empty_at = min(empty_at, simulator.now)
        tokens, seconds, joules = tokens + result.tokens, seconds + result.latency_seconds, joules + result.joules
        drafting += result.draft_seconds
    spent += world.device.idle_watts * max(0.0, DAY_SECONDS - simulator.now)
    left = 1 - spent / capacity
    return {
        CHARGE_LEFT.name: 100 * left,
        LASTS.name: min(empty_at, DAY_SECONDS / (1 - left)) / 3600,
        GENERATING_WATTS.name: joules / seconds,
        PER_TOKEN.name: 1e3 * seconds / tokens,
        DRAFTING.name: 100 * drafting / seconds,
    }


async def compute(scenario: Scenario, repetition: int) -> Values:
    if model := scenario.labels.get("model"):
        return compare(MEASURED[model])
    return simulate_day(scenario.labels["board's planner"], repetition)


BENCHMARK = Benchmark(
    name="energy",
    title="The energy model, and a day on a battery",
    scenarios=(
        *(
            Scenario(
                {"model": model, "source": measured.source},
                (MEASURED_JOULES, MODELED_JOULES, ERROR, RATE_ERROR, WATTS_ERROR),
                "Raspberry Pi 5: published measurements and the model",
                samples=1,
            )
            for model, measured in MEASURED.items()
        ),
        *(
            Scenario(
                {"board's planner": how},
                (CHARGE_LEFT, LASTS, GENERATING_WATTS, PER_TOKEN, DRAFTING),
                f"A day on a battery of {BATTERY_WATT_HOURS:.0f} Wh (simulated)",
            )
            for how in (WITHOUT, WITH, STREAMED)
        ),
    ),
    running=lambda: contextlib.nullcontext(compute),
    repetitions=5,
    quick_repetitions=2,
)
