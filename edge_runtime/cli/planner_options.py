"""Options of the planner, the planner made from them, and the probe readings that it plans with."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.cli.settings_options import add_settings
from edge_runtime.common.options import add_flag, add_option, number, whole_number
from edge_runtime.common.tasks import background_task
from edge_runtime.planning.plan import FIXED_PLAN, Plan, Planner, Surroundings
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import PlannerSettings, PolicyName

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.cli.planner_state import PlannerStateStore
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.planning.board_profile import BoardPower, SensorLine
    from edge_runtime.probes import ByteMeter
    from edge_runtime.protocol.bundle import Manifest

PLANNER_KEYS = ("planner.policy", "planner.objective", "planner.profile", "planner.radio", "planner.energy_budget")

# Options of a fixed plan by field of `Plan`: the option, the least value, which has the option's type, and its help.
FIXED_PLAN_OPTIONS: dict[str, tuple[str, float, str]] = {
    "draft": (
        "--num-assistant-tokens K",
        0,
        f"tokens to draft per round; 0 leaves every token to the target (default: {FIXED_PLAN.draft})",
    ),
    "min_confidence": (
        "--assistant-confidence-threshold P",
        0.0,
        "stop drafting after a token of lower probability than this (default: 0)",
    ),
    "siblings": (
        "--siblings B",
        0,
        f"alternative candidates to send with a draft token of low confidence (default: {FIXED_PLAN.siblings})",
    ),
    "continuation": (
        "--cloud-tokens N",
        1,
        f"tokens that the target decodes per round after the draft tokens (default: {FIXED_PLAN.continuation})",
    ),
}


def add_planner_options(parser: argparse.ArgumentParser, *, default_policy: PolicyName | None = None) -> None:
    """Add the options that `make_planner` reads."""
    planning = parser.add_argument_group("planning")
    add_settings(planning, PLANNER_KEYS[0], default=default_policy or "")
    add_settings(planning, *PLANNER_KEYS[1:])
    if default_policy:
        parser.set_defaults(**{PLANNER_KEYS[0]: default_policy})
    add_flag(planning, "--explain", "print every decision and its reason")
    fixed = parser.add_argument_group(
        "fixed plan", "the same plan for every round (policy fixed), instead of a planner"
    )
    for field, (option, minimum, text) in FIXED_PLAN_OPTIONS.items():
        parser_of_value = number(minimum, 1.0) if isinstance(minimum, float) else whole_number(minimum)
        add_option(fixed, option, text, type=parser_of_value, dest=f"fixed_plan.{field}")


def add_planner_state_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that `open_planner_state` reads."""
    add_settings(parser, "planner.state_directory")


def make_planner(options: argparse.Namespace, settings: PlannerSettings, draft: OnnxDraft) -> Planner:
    """Create the planner that the options and settings describe.

    Measures the draft's speed, unless the plan is fixed or the board's profile has steady measurements of this draft.

    Raises:
        InputError: the options contradict each other or do not parse.
        DraftError: the draft does not run.
    """
    from edge_runtime.planning import factory
    from edge_runtime.planning.board_profile import cache_bytes, find_profile, weight_bytes
    from edge_runtime.planning.device_model import DeviceModel
    from edge_runtime.planning.energy_budget import parse_energy_budget
    from edge_runtime.planning.objective import parse_objective
    from edge_runtime.planning.plan import FixedPlanner

    if options.explain:
        _log_decisions()
    if plan := parse_fixed_plan(options, settings):
        return FixedPlanner(plan)
    manifest = draft.manifest
    device, calibrated = DeviceModel(), None
    if settings.profile:
        profile = find_profile(settings.profile)
        device = DeviceModel.from_profile(
            profile, weight_bytes(manifest), radio=settings.radio, cache_bytes=cache_bytes(manifest)
        )
        calibrated = profile.steady_measurement(manifest)
        if calibrated is not None and calibrated.threads != draft.threads:
            # Another number of threads was asked for.
            calibrated = None
    if calibrated is not None:
        device = DeviceModel.from_measurement(calibrated, device)
    else:
        step_seconds, prefill_seconds = draft.measure_speed()
        device = msgspec.structs.replace(device, step_seconds=step_seconds, prefill_seconds=prefill_seconds)
    # The overhead is 0 because the board's own work per round is part of every measured exchange.
    device = msgspec.structs.replace(device, overhead_seconds=0.0)
    budget = None
    if settings.energy_budget:
        # The wall clock is read once, here, so that a clock that jumps does not move the end of the budget.
        now = datetime.datetime.now().astimezone()
        budget = parse_energy_budget(settings.energy_budget, now, time.monotonic())
    return factory.make_planner(
        settings.policy or factory.DEFAULT_POLICY,
        parse_objective(settings.objective),
        device,
        acceptance=manifest.acceptance,
        budget=budget,
    )


def open_planner_state(settings: PlannerSettings, manifest: Manifest) -> PlannerStateStore:
    """Return the store of what planners have learned about the draft of `manifest`."""
    from edge_runtime.cli.planner_state import PlannerStateStore
    from edge_runtime.planning.board_profile import draft_sha256

    return PlannerStateStore(settings.state_directory, draft_sha256(manifest))


def read_board_power(settings: PlannerSettings) -> BoardPower | None:
    """Return the power draw in the board's profile; None without a profile or figure. Raises InputError."""
    from edge_runtime.planning.board_profile import find_profile

    return find_profile(settings.profile).power if settings.profile else None


def read_sensor_lines(profile: str) -> Mapping[str, SensorLine]:
    """Return what the board's current sensors measure, as its profile says. Raises InputError."""
    from edge_runtime.planning.board_profile import find_profile

    return find_profile(profile).sensors.lines if profile else {}


@contextlib.asynccontextmanager
async def run_probes(meter: ByteMeter, settings: PlannerSettings) -> AsyncIterator[Callable[[], Surroundings]]:
    """Run the probes in the background; yield a function that quickly returns their latest readings."""
    from edge_runtime.probes import Prober

    prober = Prober(lines=read_sensor_lines(settings.profile))

    def surroundings() -> Surroundings:
        tcp = meter.info
        if prober.latest is None:
            return Surroundings(rtt_seconds=tcp.rtt_seconds if tcp else None)
        return prober.latest.surroundings(tcp)

    async with background_task(prober.run()):
        yield surroundings


def parse_fixed_plan(options: argparse.Namespace, settings: PlannerSettings) -> Plan | None:
    """Return the plan that the options describe; None if they describe none. Raises InputError."""
    values = {field: getattr(options, f"fixed_plan.{field}") for field in FIXED_PLAN_OPTIONS}
    given = {field: value for field, value in values.items() if value is not None}
    for field in given:
        flag = FIXED_PLAN_OPTIONS[field][0].split()[0]
        if settings.policy not in (None, "fixed"):
            policy = f"the policy is {settings.policy}; leave one of them out"
            raise InputError(f"{flag} is part of a fixed plan, and {policy}")
    if not given:
        return None
    return msgspec.structs.replace(FIXED_PLAN, **given, reason="fixed by the command line")


def _log_decisions() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for name in ("edge_runtime.decoding", "edge_runtime.planning"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        # If logging is configured (`serve`), these lines are in the log already.
        if not logger.hasHandlers():
            logger.addHandler(handler)
