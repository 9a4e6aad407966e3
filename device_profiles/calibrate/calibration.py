"""Measures the board at hand: memory, a draft over context lengths and threads, power, and the link to a verifier.

It measures through the board's own runner and client, so that what it finds is what decoding will see. That makes three
exceptions to the rule that arrows point down: this module imports `edge_runtime.draft`, `edge_runtime.probes` and
`edge_runtime.verifier.client`, none of which imports it.

Everything is bound by time: each stage has a share of the whole and ends with it, and a step that would not fit is left
out. Medians throughout, except for memory (see `machine.read_bandwidth`).
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
from edge_runtime.draft.model import DraftContext, OnnxDraft
from edge_runtime.planning.board_profile import (
    Calibration,
    DraftSpeed,
    Link,
    Power,
    Processor,
    Profile,
    draft_sha256,
    weight_bytes,
)
from edge_runtime.protocol.bundle import Bundle, read_bundle
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient

# A drafted token's choice costs least when greedy and most with top-p; this is between.
SAMPLING = Sampling(temperature=0.7)
# Tokens of one measured proposal, and the fewest proposals that make a median.
TOKENS = 4
ROUNDS = 3
# Prompts shorter than this do not fill the cores, and say little of prefill.
LONG_PROMPT = 64
SAMPLE_SECONDS = 0.2
REQUESTS = 5
# How long a verifier may take to answer at all.
VERIFIER_SECONDS = 10.0
FIRST_CONTEXTS = (16, 128, 512)
MOST_THREADS = 8
# Shares of the time, by stage; the draft has what is left.
MEMORY_SHARE, POWER_SHARE, LINK_SHARE = 0.05, 0.08, 0.05

Watts = Callable[[], float | None]
Tick = Callable[[str], None]


class Order(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        bundle: the draft's directory.
        name: the profile's name.
        title: for people; empty takes the board's own name.
        seconds: how long all of it may take; slow boards need a little more.
        verifier: URL; empty leaves the link out.
        like: a profile to take [power], [radio] and [sensors] from, as far as they cannot be measured.
        sensor: what measures the watts, in words.
    """

    bundle: Path
    name: str
    title: str = ""
    seconds: float = 60.0
    verifier: str = ""
    like: Profile | None = None
    sensor: str = "a sensor"


def calibrate(order: Order, watts: Watts, tick: Tick) -> Profile:
    """Measures as `order` says.

    Args:
        watts: what the board draws now; None without a sensor.
        tick: called often with what is going on, but never while something is being measured.

    Raises:
        BundleError, DraftError: the draft cannot be used.
        InputError, VerifierError: the verifier cannot be used.
    """
    started = time.monotonic()
    until = started + order.seconds
    load = machine.load()
    tick("reading the bundle")
    bundle = read_bundle(order.bundle)
    link = asyncio.run(_link(order.verifier, LINK_SHARE * order.seconds, tick)) if order.verifier else None
    power_seconds = 0.0 if watts() is None else POWER_SHARE * order.seconds
    idle = _watts_while(partial(_idle, power_seconds, tick), watts)
    one, memory = (_memory(threads, MEMORY_SHARE * order.seconds, tick) for threads in (1, machine.cores()))
    speeds: list[DraftSpeed] = []
    counts = thread_counts(machine.cores())
    for number, threads in enumerate(counts):
        share = (until - power_seconds - time.monotonic()) / (len(counts) - number)
        speeds.append(_draft_speed(bundle, threads, share, watts, tick))
    loaded = _watts_while(partial(machine.busy, power_seconds, partial(tick, "all cores busy")), watts)
    date = datetime.datetime.now(datetime.UTC).date()
    like = order.like
    profile = Profile(
        name=order.name,
        title=order.title or machine.model(),
        origin="measured",
        processor=_processor(speeds, memory, date),
        draft=speeds,
        link=link,
        calibration=Calibration(
            date=date,
            seconds=round(time.monotonic() - started, 1),
            kernel=machine.kernel(),
            runtime=f"onnxruntime {ort.__version__}",
            one_thread_bytes_per_second=_digits(one),
            read_bytes_per_second=_digits(memory),
            load=_digits(load),
            governor=machine.governor(),
        ),
    )
    if like is not None:
        profile = msgspec.structs.replace(profile, power=like.power, radio=like.radio, sensors=like.sensors)
    if idle is not None and loaded is not None:
        profile = msgspec.structs.replace(profile, power=_power(idle, loaded, f"this board on {date}, {order.sensor}"))
    return profile


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4 and all cores, as far as there are so many, and never more than a small draft can use."""
    most = min(cores, MOST_THREADS)
    return sorted({most, *(count for count in (1, 2, 4) if count <= most)})


def contexts(limit: int) -> list[int]:
    """Context lengths to measure at, for a draft whose longest text is `limit` tokens; the last is the longest."""
    longest = max(1, limit - TOKENS)
    lengths = [*FIRST_CONTEXTS]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return [*(length for length in lengths if length < longest), longest]


def _draft_speed(bundle: Bundle, threads: int, seconds: float, watts: Watts, tick: Tick) -> DraftSpeed:
    """The draft with `threads` threads, at as many context lengths as `seconds` allow, the shortest in any case."""
    until = time.monotonic() + seconds
    manifest = bundle.manifest
    context = OnnxDraft(bundle, threads).context()
    ids = np.random.default_rng(0).integers(0, manifest.architecture.vocabulary_size, context.limit).tolist()
    lengths = contexts(context.limit)
    milliseconds: dict[int, float] = {}
    rates: dict[int, float] = {}
    held = 0
    with _watching(watts) as drawn:
        for number, length in enumerate(lengths):
            # A prefill cannot be interrupted, so one that would take too long is not begun.
            if milliseconds and time.monotonic() + (length - held) / max(rates.values()) > until:
                break
            note = f"{manifest.name}, threads: {threads}, context: {length}"
            tick(note)
            started = time.perf_counter()
            context.prefill(ids[held:length])
            rates[length - held] = (length - held) / (time.perf_counter() - started)
            held = length
            share = (until - time.monotonic()) / (len(lengths) - number)
            per_token = _seconds_per_token(context, ids[:length], share, partial(tick, note))
            milliseconds[length] = round(1e3 * per_token, 4)
    long = [rate for tokens, rate in rates.items() if tokens >= LONG_PROMPT]
    return DraftSpeed(
        bundle=manifest.name,
        sha256=draft_sha256(manifest),
        weight_bytes=weight_bytes(manifest),
        threads=threads,
        milliseconds=milliseconds,
        prefill_tokens_per_second=_digits(statistics.median(long or rates.values())),
        watts=_digits(statistics.median(drawn)) if drawn else None,
    )


def _seconds_per_token(context: DraftContext, text: list[int], seconds: float, tick: Callable[[], None]) -> float:
    """The median of a few rounds: read the text's last token, propose some behind it. The context then holds `text`."""
    until = time.monotonic() + seconds
    times: list[float] = []
    while len(times) < ROUNDS or time.monotonic() < until:
        context.rollback(len(text) - 1)
        started = time.perf_counter()
        context.propose(text, TOKENS, SAMPLING)
        times.append((time.perf_counter() - started) / TOKENS)
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


def _watts_while(work: Callable[[], None], watts: Watts) -> float | None:
    """Median watts while `work` runs; None if the sensor said nothing."""
    with _watching(watts) as drawn:
        work()
    return statistics.median(drawn) if drawn else None


@contextmanager
def _watching(watts: Watts) -> Iterator[list[float]]:
    """Samples `watts` in the background into the list; a board without a sensor is asked once and left in peace."""
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


async def _link(url: str, seconds: float, tick: Tick) -> Link:
    async with VerifierClient(url, deadline=VERIFIER_SECONDS) as client:
        tick(f"asking {url}")
        await client.models()
        until = time.monotonic() + seconds
        times: list[float] = []
        while len(times) < REQUESTS or time.monotonic() < until:
            started = time.perf_counter()
            await client.models()
            times.append(time.perf_counter() - started)
            tick(f"asking {url}")
        rtt = client.meter.rtt_seconds
        return Link(url, round(statistics.median(times), 6), None if rtt is None else round(rtt, 6))


def _processor(speeds: list[DraftSpeed], memory: float, date: datetime.date) -> Processor:
    """What the measured draft says of drafts that were not.

    A draft that the caches hold is faster than memory and a tiny one is held up by other things than weights, so the
    lower of memory's speed and the draft's own is what another draft may count on.
    """
    fastest = min(speeds, key=lambda speed: speed.seconds(0))
    own = fastest.weight_bytes / fastest.seconds(0)
    prefill = max(speed.prefill_tokens_per_second for speed in speeds)
    return Processor(
        origin="measured",
        sources=[
            f"this board on {date}; decoding: the lower of memory reading, {memory / 1e9:.3g} GB/s, and the weights of "
            f"{fastest.bundle} by its time per token in a short text, {own / 1e9:.3g} GB/s",
            f"prefill: {prefill:.4g} tokens/s times the weights of {fastest.bundle}, {fastest.weight_bytes} bytes",
        ],
        model=machine.model(),
        cores=machine.cores(),
        weight_bytes_per_second=_digits(min(memory, own)),
        prefill_bytes_per_second=_digits(prefill * fastest.weight_bytes),
    )


def _power(idle: float, loaded: float, source: str) -> Power:
    # A sensor that sees little of the processor may read less under load, by chance.
    return Power(
        origin="measured",
        sources=[f"{source}: medians, idle and with all cores busy"],
        idle_watts=_digits(idle),
        busy_watts=_digits(max(idle, loaded)),
    )


def _digits(value: float) -> float:
    """To four significant digits: more would feign precision."""
    return float(f"{value:.4g}")
