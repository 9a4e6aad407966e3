"""Simulation of the decoding loop: real planners, modeled links, boards and verifiers, recorded acceptance."""

from edge_runtime.simulation.links import (
    BURSTY_BAD,
    BURSTY_GOOD,
    LINK_PRESETS,
    Link,
    LinkParameters,
    LinkPhase,
    ScheduledLink,
    SteadyLink,
    parse_link,
)
from edge_runtime.simulation.recorded_texts import (
    CONTINUATION_TOKENS,
    MAX_SIBLINGS,
    RecordedText,
    accepted_runs,
    read_texts,
    write_texts,
)
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.verifiers import VERIFIERS, SimulatedVerifier, VerifierCost, make_verifier
from edge_runtime.simulation.world import World, make_world

__all__ = [
    "BURSTY_BAD",
    "BURSTY_GOOD",
    "CONTINUATION_TOKENS",
    "LINK_PRESETS",
    "MAX_SIBLINGS",
    "VERIFIERS",
    "Link",
    "LinkParameters",
    "LinkPhase",
    "RecordedText",
    "ScheduledLink",
    "SimulatedVerifier",
    "SimulationResult",
    "Simulator",
    "SteadyLink",
    "VerifierCost",
    "World",
    "accepted_runs",
    "make_verifier",
    "make_world",
    "parse_link",
    "read_texts",
    "simulate",
    "write_texts",
]
