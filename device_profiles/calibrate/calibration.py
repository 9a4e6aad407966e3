"""Measures this board: memory, a draft over context lengths and threads, the board under sustained load, and power.

It uses the board's own draft runner, so that the figures are those that decoding sees. The measurements of the draft
are repeated, all of them in turn, until they agree or their share of the time is over; each figure is the median over
these passes, and says how far they spread. What is left of the time goes to drafting without a pause, while heat,
clock and throttling are recorded.
"""

from __future__ import annotations

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
    MAX_STEADY_SPREAD,
    MIN_STEADY_PASSES,
    TYPICAL_CONTEXT,
    BoardPower,
    BoardProfile,
    Calibration,
    MeasuredDraft,
    ProcessorSpeed,
    SustainedSample,
    draft_sha256,
    weight_bytes,
)
from edge_runtime.probes import Prober
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
FIRST_CONTEXTS = (16, 128, TYPICAL_CONTEXT)
MAX_THREADS = 8
# Shares of the total time by stage; the sustained load gets what the others leave.
MEMORY_SHARE, POWER_SHARE, LINK_SHARE, DRAFT_SHARE = 0.03, 0.06, 0.03, 0.5
# Time of one pass over all thread counts and contexts, as a share of that of the draft: fewer passes if one takes
# longer.
PASS_SHARE = 0.15
# Passes stop at half the spread that counts as steady.
TARGET_SPREAD = MAX_STEADY_SPREAD / 2
# Between two samples of the sustained load: one second, or more so that there are at most this many.
MAX_SAMPLES = 60
MIN_SAMPLE_SECONDS = 1.0

Watts = Callable[[], float | None]
Tick = Callable[[str], None]


class CalibrationConfig(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        bundle: the draft's directory.
        title: display name; empty uses the board's model.
        seconds: total time; slow boards need slightly more.
        like: profile from which to copy [power], [radio] and [sensors] that cannot be measured.
        sensor: name of the power sensor.
    """

    bundle: Path
    name: str
    title: str = ""
    seconds: float = 180.0
    like: BoardProfile | None = None
    sensor: str = "a sensor"


class DraftPass(msgspec.Struct, frozen=True):
    """One measurement of the draft with one number of threads.

    Attributes:
        seconds: per draft token, by context length.
        prefill: tokens per second.
    """

    seconds: dict[int, float]
    prefill: float


def calibrate(config: CalibrationConfig, watts: Watts, tick: Tick, prober: Prober | None = None) -> BoardProfile:
    """Measure this board.

    Args:
        watts: returns the present power; None without a sensor.
        tick: called often with a progress message, but never during a measurement.
        prober: reads temperature, clock and throttling; None for this machine's.

    Raises:
        BundleError, DraftError: the draft cannot be used.
    """
    started = time.monotonic()
    until = started + config.seconds
    load = machine.load_average()
    tick("reading the bundle")
    bundle = read_bundle(config.bundle)
    power_seconds = 0.0 if watts() is None else POWER_SHARE * config.seconds
    idle = _median_watts(partial(_idle, power_seconds, tick), watts)
    memory = _memory(machine.count_cores(), MEMORY_SHARE * config.seconds, tick)
    speeds = measure_draft(bundle, DRAFT_SHARE * config.seconds, watts, tick)
    fastest = min(speeds, key=lambda speed: speed.seconds(TYPICAL_CONTEXT))
    left = until - power_seconds - time.monotonic()
    sustained = measure_sustained(bundle, fastest.threads, left, tick, prober or Prober(program_period=2.0))
    loaded = _median_watts(partial(machine.busy, power_seconds, partial(tick, "all cores busy")), watts)
    date = datetime.datetime.now(datetime.UTC).date()
    like = config.like
    profile = BoardProfile(
        name=config.name,
        title=config.title or machine.read_board_model(),
        origin="measured",
        processor=_processor(speeds, memory, date),
        draft=speeds,
        calibration=Calibration(
            date=date,
            seconds=round(time.monotonic() - started, 1),
            kernel=machine.kernel(),
            runtime=f"onnxruntime {ort.__version__}",
            sustained=sustained,
            load=_round4(load),
            governor=machine.governor(),
        ),
    )
    if like is not None:
        profile = msgspec.structs.replace(
            profile, power=like.power, radio=like.radio, sensors=like.sensors, device_tree=like.device_tree
        )
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


def measure_draft(bundle: Bundle, seconds: float, watts: Watts, tick: Tick) -> list[MeasuredDraft]:
    """Measure the draft with each number of threads, in passes over all of them, until the passes agree.

    Takes about `seconds`, and at least one pass over the shortest context. The passes are spread over the whole time,
    so that a program that runs for a while disturbs some of them and shows as a spread.
    """
    until = time.monotonic() + seconds
    manifest = bundle.manifest
    counts = thread_counts(machine.count_cores())
    passes: dict[int, list[DraftPass]] = {threads: [] for threads in counts}
    drawn: dict[int, list[float]] = {threads: [] for threads in counts}
    longest = 0.0
    while not passes[counts[-1]] or time.monotonic() + longest < until:
        began = time.monotonic()
        for threads in counts:
            # All passes measure the same contexts, so that thread counts can be compared.
            first = next(iter(passes[counts[0]]), None)
            draft = OnnxDraft(bundle, threads)
            with _sampling_power(watts) as readings:
                note = f"{manifest.name}, pass {len(passes[threads]) + 1}, threads: {threads}"
                share = PASS_SHARE * seconds / len(counts)
                passes[threads].append(_measure_pass(draft, share, partial(tick, note), first))
            drawn[threads] += readings
        longest = max(longest, time.monotonic() - began)
        enough = len(passes[counts[-1]]) >= MIN_STEADY_PASSES
        if enough and max(map(_spread, passes.values())) <= TARGET_SPREAD:
            break
    return [_summarize(bundle, threads, passes[threads], drawn[threads]) for threads in counts]


def measure_sustained(
    bundle: Bundle, threads: int, seconds: float, tick: Tick, prober: Prober
) -> list[SustainedSample]:
    """Draft without a pause for `seconds` after a text of typical length, and sample speed, heat and throttling."""
    samples: list[SustainedSample] = []
    interval = max(MIN_SAMPLE_SECONDS, seconds / MAX_SAMPLES)
    if seconds < interval:
        return samples
    context = OnnxDraft(bundle, threads).new_context()
    text = _random_ids(bundle, min(TYPICAL_CONTEXT, context.limit - DRAFT_TOKENS))
    context.prefill(text)
    prober.take()
    started = sampled = time.monotonic()
    times: list[float] = []
    while time.monotonic() < started + seconds:
        times.append(_time_proposal(context, text))
        tick("drafting without a pause")
        if time.monotonic() - sampled >= interval:
            samples.append(_sample(prober, time.monotonic() - started, times))
            sampled, times = time.monotonic(), []
    return samples


async def measure_link(url: str, seconds: float, tick: Tick) -> float:
    """Return the round-trip time in seconds of the link to a verifier, or a small request's if the kernel has none.

    Raises:
        InputError, VerifierError: the verifier cannot be used.
    """
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
        return client.meter.rtt_seconds or statistics.median(times)


def _measure_pass(draft: OnnxDraft, seconds: float, tick: Callable[[], None], like: DraftPass | None) -> DraftPass:
    """Measure at as many context lengths as fit into `seconds`, at least the shortest; or at those of `like`."""
    until = time.monotonic() + seconds
    context = draft.new_context()
    lengths = contexts(context.limit) if like is None else sorted(like.seconds)
    ids = np.random.default_rng(0).integers(0, draft.manifest.architecture.vocabulary_size, lengths[-1]).tolist()
    times: dict[int, float] = {}
    rates: dict[int, float] = {}
    cached = 0
    for number, length in enumerate(lengths):
        # A prefill cannot be interrupted, so skip one that would take too long.
        if like is None and times and time.monotonic() + (length - cached) / max(rates.values()) > until:
            break
        tick()
        started = time.perf_counter()
        context.prefill(ids[cached:length])
        rates[length - cached] = (length - cached) / (time.perf_counter() - started)
        cached = length
        share = (until - time.monotonic()) / (len(lengths) - number)
        times[length] = _seconds_per_token(context, ids[:length], share, tick)
    long = [rate for tokens, rate in rates.items() if tokens >= MIN_PREFILL_TOKENS]
    return DraftPass(times, statistics.median(long or rates.values()))


def _summarize(bundle: Bundle, threads: int, passes: list[DraftPass], drawn: list[float]) -> MeasuredDraft:
    manifest = bundle.manifest
    return MeasuredDraft(
        bundle=manifest.name,
        sha256=draft_sha256(manifest),
        weight_bytes=weight_bytes(manifest),
        threads=threads,
        milliseconds={
            length: round(1e3 * statistics.median(found.seconds[length] for found in passes), 4)
            for length in passes[0].seconds
        },
        prefill_tokens_per_second=_round4(statistics.median(found.prefill for found in passes)),
        watts=_round4(statistics.median(drawn)) if drawn else None,
        passes=len(passes),
        spread=_round4(_spread(passes)),
    )


def _spread(passes: list[DraftPass]) -> float:
    """Largest spread over the contexts: maximum minus minimum of the passes' times, relative to their median.

    With five passes and more, the slowest fifth does not count: it is allowed to be disturbed.
    """
    spreads = []
    for length in passes[0].seconds:
        times = sorted(found.seconds[length] for found in passes)
        kept = times[: len(times) - len(times) // 5]
        spreads.append((kept[-1] - kept[0]) / statistics.median(times))
    return max(spreads)


def _seconds_per_token(context: DraftContext, text: list[int], seconds: float, tick: Callable[[], None]) -> float:
    """Median time per drafted token after `text`, one token of prefill included. Leaves `text` in the context."""
    until = time.monotonic() + seconds
    times: list[float] = []
    while len(times) < MIN_PROPOSALS or time.monotonic() < until:
        times.append(_time_proposal(context, text))
        tick()
    context.rollback(len(text))
    return statistics.median(times)


def _time_proposal(context: DraftContext, text: list[int]) -> float:
    """Draft after `text` and return the seconds per token."""
    context.rollback(len(text) - 1)
    started = time.perf_counter()
    context.propose(text, DRAFT_TOKENS, SAMPLING)
    return (time.perf_counter() - started) / DRAFT_TOKENS


def _sample(prober: Prober, seconds: float, times: list[float]) -> SustainedSample:
    snapshot = prober.take()
    throttling = snapshot.throttling
    return SustainedSample(
        seconds=round(seconds, 1),
        milliseconds=_round4(1e3 * statistics.median(times)),
        celsius=snapshot.thermal.celsius if snapshot.thermal else None,
        hertz=snapshot.processor.hertz if snapshot.processor else None,
        throttled=throttling.reasons if throttling else [],
    )


def _random_ids(bundle: Bundle, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(0, bundle.manifest.architecture.vocabulary_size, count).tolist()
    return ids


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
