"""Measures this board: memory, a draft over context lengths and threads, power, and the link to a verifier.

It uses the board's own draft runner and verifier client, so that the figures are those that decoding sees. Every stage
has a share of the total time; a measurement that would not fit is skipped. Figures are medians, except memory bandwidth
(see `machine.read_bandwidth`).
"""

from __future__ import annotations

import asyncio
import datetime
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from device_profiles.calibrate import machine
from edge_runtime.draft import DraftContext, OnnxDraft
from edge_runtime.planning.board_profile import (
    BoardPower,
    BoardProfile,
    Calibration,
    MeasuredDraft,
    MeasuredLink,
    ProcessorSpeed,
    draft_sha256,
    weight_bytes,
)
from edge_runtime.protocol.bundle import Bundle, read_bundle
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier import VerifierClient

# Sampling costs least when greedy and most with top-p; this is in between.
SAMPLING = Sampling(temperature=0.7)
# Tokens per measured proposal, and the minimum number of proposals for a median.
DRAFT_TOKENS = 4
MIN_PROPOSALS = 3
# Shorter prompts do not saturate the cores and say little about prefill.
MIN_PREFILL_TOKENS = 64
SAMPLE_SECONDS = 0.2
MIN_REQUESTS = 5
# Time limit for the verifier's answer.
VERIFIER_SECONDS = 10.0
FIRST_CONTEXTS = (16, 128, 512)
MAX_THREADS = 8
# Shares of the total time by stage; the draft gets the rest.
MEMORY_SHARE, POWER_SHARE, LINK_SHARE = 0.05, 0.08, 0.05

Watts = Callable[[], float | None]
Tick = Callable[[str], None]


class CalibrationConfig(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        bundle: the draft's directory.
        name: the profile's name.
        title: display name; empty uses the board's model.
        seconds: total time; slow boards need slightly more.
        verifier: URL of a verifier; empty skips the link.
        like: profile from which to copy [power], [radio] and [sensors] that cannot be measured.
        sensor: name of the power sensor.
    """

    bundle: Path
    name: str
    title: str = ""
    seconds: float = 60.0
    verifier: str = ""
    like: BoardProfile | None = None
    sensor: str = "a sensor"


def calibrate(config: CalibrationConfig, watts: Watts, tick: Tick) -> BoardProfile:
    """Measure this board.

    Args:
        watts: returns the present power; None without a sensor.
        tick: called often with a progress message, but never during a measurement.

    Raises:
        BundleError, DraftError: the draft cannot be used.
        InputError, VerifierError: the verifier cannot be used.
    """
    started = time.monotonic()
    until = started + config.seconds
    load = machine.load_average()
    tick("reading the bundle")
    bundle = read_bundle(config.bundle)
    link = asyncio.run(_link(config.verifier, LINK_SHARE * config.seconds, tick)) if config.verifier else None
    power_seconds = 0.0 if watts() is None else POWER_SHARE * config.seconds
    idle = _median_watts(partial(_idle, power_seconds, tick), watts)
    one, memory = (_memory(threads, MEMORY_SHARE * config.seconds, tick) for threads in (1, machine.count_cores()))
    speeds: list[MeasuredDraft] = []
    counts = thread_counts(machine.count_cores())
    for number, threads in enumerate(counts):
        share = (until - power_seconds - time.monotonic()) / (len(counts) - number)
        speeds.append(_draft_speed(bundle, threads, share, watts, tick))
    loaded = _median_watts(partial(machine.busy, power_seconds, partial(tick, "all cores busy")), watts)
    date = datetime.datetime.now(datetime.UTC).date()
    like = config.like
    profile = BoardProfile(
        name=config.name,
        title=config.title or machine.read_board_model(),
        origin="measured",
        processor=_processor(speeds, memory, date),
        draft=speeds,
        link=link,
        calibration=Calibration(
            date=date,
            seconds=round(time.monotonic() - started, 1),
            kernel=machine.kernel(),
            runtime=f"onnxruntime {ort.__version__}",
            one_thread_bytes_per_second=_round4(one),
            read_bytes_per_second=_round4(memory),
            load=_round4(load),
            governor=machine.governor(),
        ),
    )
    if like is not None:
        profile = msgspec.structs.replace(profile, power=like.power, radio=like.radio, sensors=like.sensors)
    if idle is not None and loaded is not None:
        profile = msgspec.structs.replace(profile, power=_power(idle, loaded, f"this board on {date}, {config.sensor}"))
    return profile


def thread_counts(cores: int) -> list[int]:
    """Numbers of threads to measure: 1, 2, 4 and all cores, capped at what a small draft can use."""
    maximum = min(cores, MAX_THREADS)
    return sorted({maximum, *(count for count in (1, 2, 4) if count <= maximum)})


def contexts(limit: int) -> list[int]:
    """Ascending context lengths to measure, for a draft with a context of `limit` tokens."""
    longest = max(1, limit - DRAFT_TOKENS)
    lengths = [*FIRST_CONTEXTS]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return [*(length for length in lengths if length < longest), longest]


def _draft_speed(bundle: Bundle, threads: int, seconds: float, watts: Watts, tick: Tick) -> MeasuredDraft:
    """Measure the draft at as many context lengths as fit into `seconds`, at least the shortest."""
    until = time.monotonic() + seconds
    manifest = bundle.manifest
    context = OnnxDraft(bundle, threads).new_context()
    ids = np.random.default_rng(0).integers(0, manifest.architecture.vocabulary_size, context.limit).tolist()
    lengths = contexts(context.limit)
    milliseconds: dict[int, float] = {}
    rates: dict[int, float] = {}
    cached = 0
    with _sampling_power(watts) as drawn:
        for number, length in enumerate(lengths):
            # A prefill cannot be interrupted, so skip one that would take too long.
            if milliseconds and time.monotonic() + (length - cached) / max(rates.values()) > until:
                break
            note = f"{manifest.name}, threads: {threads}, context: {length}"
            tick(note)
            started = time.perf_counter()
            context.prefill(ids[cached:length])
            rates[length - cached] = (length - cached) / (time.perf_counter() - started)
            cached = length
            share = (until - time.monotonic()) / (len(lengths) - number)
            per_token = _seconds_per_token(context, ids[:length], share, partial(tick, note))
            milliseconds[length] = round(1e3 * per_token, 4)
    long = [rate for tokens, rate in rates.items() if tokens >= MIN_PREFILL_TOKENS]
    return MeasuredDraft(
        bundle=manifest.name,
        sha256=draft_sha256(manifest),
        weight_bytes=weight_bytes(manifest),
        threads=threads,
        milliseconds=milliseconds,
        prefill_tokens_per_second=_round4(statistics.median(long or rates.values())),
        watts=_round4(statistics.median(drawn)) if drawn else None,
    )


def _seconds_per_token(context: DraftContext, text: list[int], seconds: float, tick: Callable[[], None]) -> float:
    """Median time per drafted token after `text`, one token of prefill included. Leaves `text` in the context."""
    until = time.monotonic() + seconds
    times: list[float] = []
    while len(times) < MIN_PROPOSALS or time.monotonic() < until:
        context.rollback(len(text) - 1)
        started = time.perf_counter()
        context.propose(text, DRAFT_TOKENS, SAMPLING)
        times.append((time.perf_counter() - started) / DRAFT_TOKENS)
        tick()
    context.rollback(len(text))
    return statistics.median(times)


def _memory(threads: int, seconds: float, tick: Tick) -> float:
    return machine.read_bandwidth(threads, seconds, partial(tick, f"reading memory, threads: {threads}"))


def _idle(seconds: float, tick: Tick) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        tick("idle")
        time.sleep(SAMPLE_SECONDS)


def _median_watts(work: Callable[[], None], watts: Watts) -> float | None:
    """Median power while `work` runs; None without readings."""
    with _sampling_power(watts) as drawn:
        work()
    return statistics.median(drawn) if drawn else None


@contextmanager
def _sampling_power(watts: Watts) -> Iterator[list[float]]:
    """Sample `watts` into the yielded list in the background; without a sensor the list stays empty."""
    drawn: list[float] = []
    if watts() is None:
        yield drawn
        return
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(SAMPLE_SECONDS):
            value = watts()
            if value is not None:
                drawn.append(value)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield drawn
    finally:
        stopped.set()
        sampler.join()
        # A measurement may be shorter than the time between two samples.
        if not drawn and (value := watts()) is not None:
            drawn.append(value)


async def _link(url: str, seconds: float, tick: Tick) -> MeasuredLink:
    async with VerifierClient(url, deadline=VERIFIER_SECONDS) as client:
        tick(f"querying {url}")
        await client.models()
        until = time.monotonic() + seconds
        times: list[float] = []
        while len(times) < MIN_REQUESTS or time.monotonic() < until:
            started = time.perf_counter()
            await client.models()
            times.append(time.perf_counter() - started)
            tick(f"querying {url}")
        rtt = client.meter.rtt_seconds
        return MeasuredLink(url, round(statistics.median(times), 6), None if rtt is None else round(rtt, 6))


def _processor(speeds: list[MeasuredDraft], memory: float, date: datetime.date) -> ProcessorSpeed:
    """Extrapolate from the measured draft to others.

    A draft that fits into the caches exceeds memory bandwidth, and a tiny one is limited by overhead instead of
    weights, so another draft can rely on the lower of memory bandwidth and the measured draft's rate.
    """
    fastest = min(speeds, key=lambda speed: speed.seconds(0))
    draft_rate = fastest.weight_bytes / fastest.seconds(0)
    prefill = max(speed.prefill_tokens_per_second for speed in speeds)
    return ProcessorSpeed(
        origin="measured",
        sources=[
            f"this board on {date}; decoding: the lower of memory reading, {memory / 1e9:.3g} GB/s, and the weights of "
            f"{fastest.bundle} by its time per token in a short text, {draft_rate / 1e9:.3g} GB/s",
            f"prefill: {prefill:.4g} tokens/s times the weights of {fastest.bundle}, {fastest.weight_bytes} bytes",
        ],
        model=machine.read_board_model(),
        cores=machine.count_cores(),
        weight_bytes_per_second=_round4(min(memory, draft_rate)),
        prefill_bytes_per_second=_round4(prefill * fastest.weight_bytes),
    )


def _power(idle: float, loaded: float, source: str) -> BoardPower:
    # A sensor that covers little of the processor may read less under load by chance.
    return BoardPower(
        origin="measured",
        sources=[f"{source}: medians, idle and with all cores busy"],
        idle_watts=_round4(idle),
        busy_watts=_round4(max(idle, loaded)),
    )


def _round4(value: float) -> float:
    """Round to four significant digits, the precision of these measurements."""
    return float(f"{value:.4g}")
