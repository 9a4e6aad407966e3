"""Explains a calibration in plain words: speed, heat, power, and on which links drafting pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

import msgspec

from edge_runtime.planning.analytic import AnalyticPlanner, CostComparison
from edge_runtime.planning.board_profile import (
    MAX_STEADY_SPREAD,
    MIN_STEADY_PASSES,
    TYPICAL_CONTEXT,
    BoardProfile,
    MeasuredDraft,
    cache_bytes,
    weight_bytes,
)
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.objective import parse_objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.protocol.bundle import Manifest
from edge_runtime.simulation import LINK_PRESETS, make_verifier

# Verifiers for which links are compared: a 7B and a 32B model on an idle GPU, and a loaded or cheap GPU.
VERIFIER_NAMES = ("7b", "32b", "loaded")
# The text for which they are: an answer of this length, in a chat at T = 0.7. Chosen.
ANSWER_TOKENS = 200
TEMPERATURE = 0.7
# Streamed rounds that the planner is shown, which teach it link and verifier; and tokens of each.
STREAMS, STREAM_TOKENS = 4, 16
# A board that drafts this much slower at the end of its sustained load than at the beginning has throttled. Chosen.
THROTTLED_FACTOR = 1.1
# A shorter load says nothing about throttling: a board without a cooler takes minutes to heat up.
MIN_SUSTAINED_SECONDS = 120.0


def compare_costs(
    device: DeviceModel, manifest: Manifest, link_seconds: float, forward_seconds: float
) -> CostComparison:
    """Return the planner's own comparison of drafting and streaming, once it knows the link and the verifier.

    Args:
        device: figures of the board with this draft.
        link_seconds: of a round, both ways.
        forward_seconds: of the verifier, for one token.
    """
    planner = AnalyticPlanner(parse_objective("latency"), device, acceptance=manifest.acceptance)
    conditions = Conditions(ANSWER_TOKENS, TYPICAL_CONTEXT, unread=0, temperature=TEMPERATURE)
    first = link_seconds + device.overhead_seconds + forward_seconds
    further = STREAM_TOKENS - 1
    for number in range(STREAMS):
        planner.observe(
            Outcome(
                Plan(0, continuation=STREAM_TOKENS),
                msgspec.structs.replace(conditions, now=float(number)),
                own_tokens=STREAM_TOKENS,
                first_seconds=first,
                exchange_seconds=first + further * forward_seconds,
                forward_seconds=STREAM_TOKENS * forward_seconds,
                further_forwards=further,
            )
        )
    planner.plan(msgspec.structs.replace(conditions, now=float(STREAMS)))
    comparison = planner.comparison
    assert comparison is not None
    return comparison


def describe_result(profile: BoardProfile, manifest: Manifest, links: Mapping[str, float]) -> Iterator[str]:
    """Yield what was measured and what follows from it, as lines for people.

    Args:
        manifest: of the draft that was measured.
        links: seconds of a round on further links, by name, such as the one to a verifier.
    """
    entry = profile.find_measurement(weight_bytes(manifest))
    assert entry is not None
    threads = f"{entry.threads} thread{'s' * (entry.threads > 1)}"
    seconds = entry.seconds(TYPICAL_CONTEXT)
    yield (
        f"speed: {1 / seconds:.3g} draft tokens/s after {TYPICAL_CONTEXT} tokens of text, {1 / entry.seconds(0):.3g} "
        f"in a short one, with {threads}; prefill {entry.prefill_tokens_per_second:.3g} tokens/s"
    )
    if not entry.is_steady:
        yield (
            f"UNSTEADY: {entry.passes} measurements of the same figure spread by {entry.spread:.0%} of it (at least "
            f"{MIN_STEADY_PASSES} and at most {MAX_STEADY_SPREAD:.0%} count as steady), so the planner will not rely "
            "on them; stop other programs, or give it more --seconds"
        )
    by_itself = "; commands with --profile FILE use it by themselves" if entry.is_steady else ""
    yield f"threads: --threads {entry.threads} is the fastest{by_itself}"
    yield f"heat: {_describe_heat(profile, entry)}"
    yield f"power: {_describe_power(profile, entry)}"
    device = DeviceModel.from_profile(profile, entry.weight_bytes, cache_bytes=cache_bytes(manifest))
    device = DeviceModel.from_measurement(entry, device)
    yield f"does drafting pay? ms per token streamed -> drafted, by the planner's cost model, T = {TEMPERATURE:g}:"
    rtts = {name: link.rtt_seconds for name, link in LINK_PRESETS.items()} | dict(links)
    for name, link_seconds in rtts.items():
        cells = []
        for verifier in VERIFIER_NAMES:
            forward = make_verifier(verifier, 0).forward_seconds[1]
            comparison = compare_costs(device, manifest, link_seconds, forward)
            streamed, drafted = (1e3 * cost / comparison.left for cost in (comparison.streamed, comparison.drafted))
            answer = f"yes, K = {comparison.round.plan.draft}" if drafted < streamed else "no"
            cells.append(f"{verifier}: {streamed:.3g} -> {drafted:.3g} {answer}")
        yield f"  {name} ({1e3 * link_seconds:.3g} ms): {'; '.join(cells)}"


def _describe_heat(profile: BoardProfile, entry: MeasuredDraft) -> str:
    samples = profile.calibration.sustained if profile.calibration else []
    if not samples:
        return "not measured; give it more --seconds"
    quarter = max(1, len(samples) // 4)
    cold, hot = (median(sample.milliseconds for sample in part) for part in (samples[:quarter], samples[-quarter:]))
    last = samples[-1]
    facts = [
        *([f"{last.celsius:.0f} degrees Celsius"] if last.celsius is not None else []),
        *([f"{last.hertz / 1e9:.2g} GHz"] if last.hertz is not None else []),
        *dict.fromkeys(reason for sample in samples for reason in sample.throttled),
    ]
    at_end = f" ({', '.join(facts)})" if facts else ""
    if hot > THROTTLED_FACTOR * cold:
        slower = (
            f"after {last.seconds:.0f} s of drafting without a pause it takes {hot / cold:.2g} times as long{at_end}"
        )
        throttled = any(sample.throttled for sample in samples)
        return slower if entry.is_steady or throttled else f"{slower}, or other programs slow it down"
    if last.seconds < MIN_SUSTAINED_SECONDS:
        return f"no slower after {last.seconds:.0f} s{at_end}, which is too short to tell; give it --seconds 600"
    return f"no slower after {last.seconds:.0f} s of drafting without a pause{at_end}"


def _describe_power(profile: BoardProfile, entry: MeasuredDraft) -> str:
    drafting = f", {entry.watts:.3g} W while drafting" if entry.watts is not None else ""
    if profile.power is None:
        return f"unknown: no sensor, and no --like profile{drafting}"
    power = profile.power
    return f"{power.idle_watts:.3g} W idle, {power.busy_watts:.3g} W busy{drafting} ({power.origin})"
