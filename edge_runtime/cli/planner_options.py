"""Who plans a user's answers: the planner from the options, and what the probes tell it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.board_profile import Power, cache_bytes, find_profile, weight_bytes
from edge_runtime.planning.device_model import Device
from edge_runtime.planning.energy_budget import parse_budget
from edge_runtime.planning.factory import DEFAULT, NAMES, make_planner
from edge_runtime.planning.objective import PRESETS, parse_objective
from edge_runtime.planning.plan import FIXED, FixedPlanner, Plan, Planner, Surroundings
from edge_runtime.probes.snapshot import Prober
from edge_runtime.probes.tcp import ByteMeter
from edge_runtime.protocol.errors import InputError

RADIOS = ("wifi", "ethernet", "lte", "5g")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `planner_of` reads."""
    planning = parser.add_argument_group("planning")
    planning.add_argument("--policy", choices=NAMES, help=f"who decides how much to draft (default: {DEFAULT})")
    planning.add_argument(
        "--objective",
        default="latency",
        help=f"what a token should cost least of: {', '.join(PRESETS)}, or prices in seconds of waiting such as "
        "verifier=2,joule=0.05 (default: %(default)s)",
    )
    planning.add_argument(
        "--profile", metavar="NAME", help="what this board is: a profile of `device-profile list`, or a .toml file"
    )
    planning.add_argument(
        "--radio", choices=RADIOS, default="", help="what the link goes over, for its energy (default: not counted)"
    )
    planning.add_argument(
        "--energy-budget",
        metavar="BUDGET",
        help="joules per hour, such as 18000, or until when the battery must last, such as 18:00",
    )
    planning.add_argument("--explain", action="store_true", help="print every decision and its reason")
    fixed = parser.add_argument_group("a fixed plan instead (policy fixed)")
    fixed.add_argument("--num-assistant-tokens", type=int, metavar="K", help=f"drafted per round ({FIXED.draft})")
    fixed.add_argument(
        "--assistant-confidence-threshold",
        type=float,
        metavar="P",
        help="stop drafting behind a token of less than this probability (0)",
    )
    fixed.add_argument(
        "--siblings", type=int, metavar="B", help=f"alternatives beside a doubtful drafted token ({FIXED.siblings})"
    )
    fixed.add_argument(
        "--cloud-tokens",
        type=int,
        metavar="N",
        help=f"that the target says itself per round; with 0 assistant tokens it streams ({FIXED.own})",
    )


def planner_of(options: argparse.Namespace, draft: OnnxDraft) -> Planner:
    """The planner that the options ask for; the draft's speed is measured, here and now.

    Raises:
        InputError: the options contradict each other or do not parse.
        DraftError: the draft does not run.
    """
    manifest = draft.manifest
    if options.explain:
        _explain()
    fixed = _fixed_plan(options)
    if fixed is not None:
        return FixedPlanner(fixed)
    device = Device()
    if options.profile:
        profile = find_profile(options.profile)
        device = Device.of(profile, weight_bytes(manifest), radio=options.radio, cache_bytes=cache_bytes(manifest))
    step, read = draft.measure()
    # The board's own work per round is measured too: it is part of every exchange.
    device = msgspec.structs.replace(device, step_seconds=step, prefill_seconds=read, overhead_seconds=0.0)
    budget = None
    if options.energy_budget:
        # A wall clock that jumps must not move the end of the day: it is read once, here.
        now = datetime.datetime.now().astimezone()
        budget = parse_budget(options.energy_budget, now, time.monotonic())
    return make_planner(
        options.policy or DEFAULT,
        parse_objective(options.objective),
        device,
        acceptance=manifest.acceptance,
        budget=budget,
    )


def power_of(options: argparse.Namespace) -> Power | None:
    """What the board draws by its profile; None if there is no profile, or it does not say. Raises InputError."""
    return find_profile(options.profile).power if options.profile else None


@contextlib.asynccontextmanager
async def watching(meter: ByteMeter) -> AsyncIterator[Callable[[], Surroundings]]:
    """What the probes and the connections know, kept up to date in the background; quick to ask."""
    prober = Prober()

    def surroundings() -> Surroundings:
        tcp = meter.info
        if prober.latest is None:
            return Surroundings(rtt_seconds=tcp.rtt_seconds if tcp else None)
        return prober.latest.surroundings(tcp)

    task = asyncio.create_task(prober.run())
    try:
        yield surroundings
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _fixed_plan(options: argparse.Namespace) -> Plan | None:
    """The plan that the options spell out; None if they leave it to a policy. Raises InputError."""
    counts = {
        "draft": ("--num-assistant-tokens", options.num_assistant_tokens, 0),
        "siblings": ("--siblings", options.siblings, 0),
        "own": ("--cloud-tokens", options.cloud_tokens, 1),
        "min_confidence": ("--assistant-confidence-threshold", options.assistant_confidence_threshold, 0),
    }
    given = {field: value for field, (_, value, _) in counts.items() if value is not None}
    if not given:
        return None
    if options.policy not in (None, "fixed"):
        name = next(name for field, (name, _, _) in counts.items() if field in given)
        raise InputError(f"{name} is part of a fixed plan, and the policy is {options.policy}; leave one of them out")
    for name, value, least in counts.values():
        if value is not None and value < least:
            raise InputError(f"{name} {value}: must be at least {least}")
    return msgspec.structs.replace(FIXED, **given, reason="fixed by the command line")


def _explain() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for name in ("edge_runtime.decoding", "edge_runtime.planning"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        # Where a log is set up, these lines are in it already.
        if not logger.hasHandlers():
            logger.addHandler(handler)
