"""This project against everything else that a user would pick: `python -m tests.benchmarks run systems`.

Real processes, real HTTP and a real model over the emulated link: the board, and in the cloud a verifier, a verifier
that speculates, and a verifier that receives probabilities (`comparison`), all with the same target and runner. Every
sample is one answer to a question or about a long document, or a conversation, whose turns begin with what earlier ones
left in the KV caches of both ends; repetition r is the same text and seed for all systems.

Modeled, by a real forward and a pause: the forwards of the verifier (a row of `simulation.verifiers`, measured on an
H200) and the steps of the board's draft (its profile). By what real ones take longer than modeled ones, in all, figures
may be too high: it is shown as a share of the answer's time. Joules are computed from the board's profile. A planner
generates one text before the first sample, and the fixed K of a baseline is the best one for what it measures on such a
text. A verifier that speculates generates eight texts when it has started.

BENCHMARK_TRACES=DIRECTORY adds recorded links: every pair of NAME.up and NAME.down in Mahimahi's format.
BENCHMARK_DEVICE=cuda runs the target on a GPU, where forwards are fast enough for the faster verifiers, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import httpx
import msgspec

from edge_runtime.protocol.bundle import Bundle, read_bundle, read_chat_format
from edge_runtime.protocol.sampling import common_prefix_length
from edge_runtime.service.chat_template import ChatTemplate
from export.example_family.prepare import prepare_family
from tests.benchmarks.comparison.board import AnswerCommand, AnswerReport, Costs, Prepare, System, make_device
from tests.benchmarks.comparison.cloud import SetPace
from tests.benchmarks.comparison.links import LINK_COLUMNS, link_conditions, mean_rate, measure_link
from tests.benchmarks.comparison.pacing import PaceCounts
from tests.benchmarks.comparison.texts import (
    QUESTIONS,
    TEXT_TITLES,
    TOKENS,
    TURN_TOKENS,
    References,
    TextKind,
    make_turns,
)
from tests.benchmarks.harness.benchmark import Benchmark, Measure, Overview, Quantity, RatioGoal, Scenario, Values
from tests.benchmarks.harness.samples import ROOT
from tests.emulator.control import ControlledProcess
from tests.emulator.network import ADDRESSES, Network, missing_requirement

# What a planner and the choice of K learn from before the first sample.
TRIAL_QUESTION = "Tell me something about cats."
# A verifier that has just started learns what its own drafts are worth from an answer to each question, with seeds that
# no sample has: otherwise the first systems would pay for what the later ones profit from.
WARM_UP_SEED = 1000

SYSTEMS = (
    *(
        System(f"FlexSpec, {objective}", "planner", cloud="speculating", objective=objective)
        for objective in ("latency", "balanced", "energy", "cloud")
    ),
    *(
        System(f"FlexSpec, {objective}; no draft in the cloud", "planner", cloud="plain", objective=objective)
        for objective in ("latency", "cloud")
    ),
    System("streaming from the cloud", "streaming", cloud="plain"),
    System("streaming, speculating in the cloud", "streaming", cloud="speculating"),
    System("one token per request", "streaming", cloud="plain", continuation=1),
    System("best fixed K, ids only", "fixed", cloud="plain"),
    System("SpecEdge's manner: fixed K, drafting ahead", "fixed", cloud="plain", draft_ahead=True),
    System("traditional SD", "traditional", cloud="probabilities", exact=False),
    System("DSSD", "dssd", cloud="probabilities", exact=False),
    System("the draft alone", "draft", exact=False),
)
# How long packets under way are waited for, in round-trip times, before bytes are read.
DRAIN_ROUND_TRIPS = 2
START_SECONDS = 300.0
# KV cache of a verifier, and threads of the draft beside it: as many as leave other processes theirs. Chosen.
POOL_TOKENS, DRAFT_THREADS = 1 << 15, min(4, max(1, (os.cpu_count() or 1) // 4))
# Where the processes in the cloud listen.
PORTS = {"plain": 8500, "speculating": 8501, "probabilities": 8502}
PER_TOKEN = Quantity("answer, per token", "ms", digits=1)
PER_TOKEN_95 = Quantity("95 % of answers", "ms", digits=1, quantile=0.95, source=PER_TOKEN.name)
FIRST = Quantity("first token", "ms", digits=0)
UP = Quantity("IP bytes up per 100 tokens", digits=0)
DOWN = Quantity("down", digits=0)
PAYLOAD = Quantity("TCP payload", digits=0)
BYTES = Quantity("IP bytes per 100 tokens", digits=0)
FORWARDS = Quantity("target forwards per token")
VERIFIER = Quantity("verifier per token", "ms", digits=1)
ACCEPTED = Quantity("draft tokens accepted", "%", digits=0)
JOULES = Quantity("modeled energy per 100 tokens", "J", digits=1)
SAME = Quantity("same text as transformers", "% of tokens", digits=0)
LENGTH = Quantity("K", digits=0)
LATE = Quantity("late", "% of the time", digits=0)
COLUMNS: tuple[Quantity, ...] = (
    PER_TOKEN,
    PER_TOKEN_95,
    FIRST,
    UP,
    DOWN,
    PAYLOAD,
    FORWARDS,
    VERIFIER,
    ACCEPTED,
    JOULES,
    SAME,
    LENGTH,
    LATE,
)
EXACT = Quantity(SAME.name, SAME.unit, digits=0, goal=100, higher_is_better=True)


class ComparedPlace(NamedTuple):
    """What all systems of one table have in common.

    Attributes:
        link: a preset, or the path of a recorded link without its suffix.
        verifier, board: names of modeled ones; an empty verifier is this machine.
        text: what a sample is.
    """

    link: str
    verifier: str = "loaded"
    board: str = "raspberry-pi-5"
    temperature: float = 0.7
    version: str = "target-v1"
    text: TextKind = "questions"

    @property
    def title(self) -> str:
        """Heading of the table."""
        verifier = f"verifier `{self.verifier}` (modeled)" if self.verifier else "verifier on this machine"
        parts = [Path(self.link).name, verifier, f"{self.board} (modeled)", f"T={self.temperature:g}"]
        parts += [self.version] * (self.version != "target-v1")
        return ", ".join(parts + [TEXT_TITLES[self.text]] * (self.text != "questions"))


def find_recordings() -> list[str]:
    """Paths of the recorded links in BENCHMARK_TRACES, without suffix."""
    directory = os.environ.get("BENCHMARK_TRACES")
    return sorted(str(path.with_suffix("")) for path in Path(directory).glob("*.up")) if directory else []


# Where the target runs. On a CPU a forward takes longer than those of the faster modeled verifiers.
DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")
FASTER_VERIFIERS = {"32b": "a 32B target on an H200", "7b": "a 7B target on an H200"}
LINKS = ("4g", "wifi", "5g", "weak-4g")
BOARDS = ("raspberry-pi-5", "raspberry-pi-4", "raspberry-pi-zero-2w", "jetson-orin-nano")
VERSIONS = ("target-v1", "target-v2", "target-v3", "target-v4")
# What is compared in one table of a README: places, with their headings.
COMPARISONS: Mapping[str, Mapping[ComparedPlace, str]] = {
    "Links": {ComparedPlace(link): link for link in LINKS}
    | {ComparedPlace(link): Path(link).name for link in find_recordings()},
    **{
        f"Links, {description} (forwards modeled)": {ComparedPlace(link, verifier): link for link in LINKS}
        for verifier, description in FASTER_VERIFIERS.items()
    },
    "Temperature 0": {ComparedPlace(link, temperature=0.0): link for link in LINKS[:2]},
    "Boards, on 4g": {ComparedPlace("4g", board=board): board for board in BOARDS},
    "Versions of the target, on 4g": {ComparedPlace("4g", version=version): version for version in VERSIONS},
    "Texts, on 4g": {ComparedPlace("4g", text=text): TEXT_TITLES[text] or text for text in TEXT_TITLES},
}
# The quick one first.
PLACES = tuple(dict.fromkeys(place for headings in COMPARISONS.values() for place in headings))
QUICK_PLACES = 1


def make_overviews(comparisons: Mapping[str, Mapping[ComparedPlace, str]]) -> list[Overview]:
    """What READMEs show of the tables of all places."""
    return [
        Overview(title, {place.title: heading for place, heading in headings.items()}, (PER_TOKEN, BYTES, JOULES))
        for title, headings in comparisons.items()
    ]


class Case(NamedTuple):
    """What a scenario measures: a system at a place, or the link of a place."""

    place: ComparedPlace
    system: System | None


# Scenarios by key, and what they measure.
Cases: TypeAlias = Mapping[str, tuple[Scenario, Case]]


def make_cases(places: Sequence[ComparedPlace], systems: Sequence[System], *, quick_places: int) -> Cases:
    """All scenarios: those of a place together, its link first. Places share the measurement of their link.

    Args:
        quick_places: how many places a quick run takes.
    """
    cases = {}
    measured = set()
    for index, place in enumerate(places):
        quick = index < quick_places
        for system in [*[None] * (place.link not in measured), *systems]:
            if system is None:
                scenario = Scenario({"link": Path(place.link).name}, LINK_COLUMNS, "The links, measured", quick)
            else:
                columns = tuple(EXACT if each is SAME and system.exact else each for each in COLUMNS)
                samples = 0 if DEVICE == "cpu" and place.verifier in FASTER_VERIFIERS else None
                scenario = Scenario({"system": system.name}, columns, place.title, quick, samples)
            cases[scenario.key] = scenario, Case(place, system)
        measured.add(place.link)
    return cases


CASES = make_cases(PLACES, SYSTEMS, quick_places=QUICK_PLACES)


def make_goals(place: ComparedPlace) -> list[RatioGoal]:
    """What is claimed of this project at every place."""

    def goal(claim: str, value_name: str, system: str, baselines: Sequence[str], most: float) -> RatioGoal:
        keys = tuple(f"{place.title}, {name}" for name in baselines)
        return RatioGoal(claim, value_name, f"{place.title}, {system}", keys, most)

    latency, cloud = "FlexSpec, latency", "FlexSpec, cloud"
    streaming, speculating, per_token, fixed = (system.name for system in SYSTEMS[6:10])
    traditional = "traditional SD"
    return [
        goal("latency / traditional SD", PER_TOKEN.name, latency, [traditional], 0.5),
        goal("bytes / traditional SD", BYTES.name, latency, [traditional], 0.01),
        goal("energy / traditional SD", JOULES.name, latency, [traditional], 0.65),
        goal(
            "latency / best of streaming, speculating in the cloud, one token per request, fixed K",
            PER_TOKEN.name,
            latency,
            [streaming, speculating, per_token, fixed],
            1.02,
        ),
        goal("objective cloud: forwards / streaming", FORWARDS.name, cloud, [streaming], 0.4),
        goal("objective cloud: verifier time / speculating in the cloud", VERIFIER.name, cloud, [speculating], 0.75),
    ]


class Comparison:
    """The processes and the link between them."""

    def __init__(self, network: Network, family: Path, stack: contextlib.ExitStack) -> None:
        self._network, self._family, self._stack = network, family, stack
        self._bundle: Bundle = read_bundle((family / "bundle").resolve(), verify=False)
        from tokenizers import Tokenizer

        self._template = ChatTemplate(read_chat_format(self._bundle), self._bundle.path)
        self._tokenizer = Tokenizer.from_file(str(self._bundle.tokenizer_path))
        self._references = References(ROOT / "build" / "benchmarks" / "references.json")
        command = [sys.executable, "-m", "tests.benchmarks.comparison.board", str(self._bundle.path)]
        self._board = ControlledProcess(network.command("board", command), cwd=ROOT)
        stack.callback(self._board.stop)
        self._clouds: dict[str, ControlledProcess] = {}
        self._version = ""

    def _start_clouds(self, version: str) -> None:
        """Let the cloud serve a version."""
        for process in self._clouds.values():
            process.stop()
        self._clouds, self._version = {}, version
        target, host = self._family / version, ADDRESSES["cloud"]
        for name, port in PORTS.items():
            options = ["probabilities", str(target), host, str(port), DEVICE]
            if name != "probabilities":
                options = ["verifier", str(target), "--host", host, "--port", str(port), "--threads", "1"]
                options += ["--device", DEVICE, "--max-tokens", str(POOL_TOKENS), "--no-compile"]
            if name == "speculating":
                options += ["--draft", str(self._bundle.path), "--draft-threads", str(DRAFT_THREADS)]
            command = [sys.executable, "-m", "tests.benchmarks.comparison.cloud", *options]
            with _log_path(name).open("wb") as log:
                process = ControlledProcess(self._network.command("cloud", command), cwd=ROOT, stderr=log)
            self._stack.callback(process.stop)
            self._clouds[name] = process
        with self._network.inside("board"):
            for name, process in self._clouds.items():
                self._wait_until_ready(name, process)

    @staticmethod
    def _wait_until_ready(name: str, process: ControlledProcess) -> None:
        url, end = f"http://{ADDRESSES['cloud']}:{PORTS[name]}/readyz", time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url).is_success:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the process {name!r} does not serve: see {_log_path(name)}")

    async def measure(self, case: Case, repetition: int) -> Values:
        place, system = case
        if system is None:
            return await asyncio.to_thread(measure_link, self._network, place.link)
        restarted = place.version != self._version
        if restarted:
            self._start_clouds(place.version)
        conditions = link_conditions(place.link)
        link = conditions[0].link
        self._network.set_conditions(*conditions)
        if restarted:
            self._warm_up(place)
        self._prepare(place, system)
        cloud = self._clouds.get(system.cloud)
        if cloud:
            cloud.send(SetPace(place.verifier), PaceCounts)
        # Let what the preparation left arrive.
        await asyncio.sleep(DRAIN_ROUND_TRIPS * link.rtt_seconds)
        before = self._network.counters()
        answers = self._converse(place, repetition)
        await asyncio.sleep(DRAIN_ROUND_TRIPS * link.rtt_seconds)
        after = self._network.counters()
        counts = cloud.send(SetPace(place.verifier), PaceCounts) if cloud else PaceCounts()
        up, down = after.up_bytes - before.up_bytes, after.down_bytes - before.down_bytes
        values = self._describe(place, [report for _, report in answers], up, down)
        tokens = sum(len(report.ids) for _, report in answers)
        values[PAYLOAD.name] = 100 * (after.payload_bytes - before.payload_bytes) / tokens
        if system.exact or not place.temperature or system.kind == "draft":
            expected = self._references.get(self._family / place.version, [command for command, _ in answers])
            pairs = zip(answers, expected, strict=True)
            values[SAME.name] = 100 * sum(common_prefix_length(each.ids, ids) for (_, each), ids in pairs) / tokens
        late = counts.late_seconds + sum(report.late_seconds for _, report in answers)
        values[LATE.name] = 100 * late / sum(report.arrivals[-1] for _, report in answers)
        return values

    def _prepare(self, place: ComparedPlace, system: System) -> None:
        """Let the board get ready for answers of a system, and the cloud take a modeled verifier's time."""
        conditions = link_conditions(place.link)
        link, trace = conditions[0].link, conditions[0].up_trace
        cloud = self._clouds.get(system.cloud)
        if cloud:
            cloud.send(SetPace(place.verifier), PaceCounts)
        prepare = Prepare(
            system,
            place.title,
            f"http://{ADDRESSES['cloud']}:{PORTS[system.cloud]}" if cloud else "",
            place.board,
            link.radio,
            mean_rate(trace) if trace else link.up_rate,
            self._encode([{"role": "user", "content": TRIAL_QUESTION}]),
            place.temperature,
        )
        self._board.send(prepare, AnswerReport)

    def _warm_up(self, place: ComparedPlace) -> None:
        """Let the verifier that speculates learn, as one that has run for days has."""
        [system] = (each for each in SYSTEMS if each.kind == "streaming" and each.cloud == "speculating")
        self._prepare(place, system)
        for index, question in enumerate(QUESTIONS):
            prompt = self._encode([{"role": "user", "content": question}])
            self._board.send(AnswerCommand(prompt, place.temperature, WARM_UP_SEED + index, TOKENS), AnswerReport)

    def _converse(self, place: ComparedPlace, repetition: int) -> list[tuple[AnswerCommand, AnswerReport]]:
        """Ask the board what a sample asks; every answer of a conversation becomes part of the next prompt."""
        messages: list[dict[str, str]] = []
        answers = []
        for question in make_turns(place.text, repetition):
            messages.append({"role": "user", "content": question})
            tokens = TURN_TOKENS if place.text == "conversations" else TOKENS
            command = AnswerCommand(self._encode(messages), place.temperature, repetition, tokens)
            report = self._board.send(command, AnswerReport)
            answers.append((command, report))
            messages.append({"role": "assistant", "content": self._tokenizer.decode(report.ids)})
        return answers

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer.encode(self._template.render(messages)).ids
        return ids

    def _describe(self, place: ComparedPlace, reports: list[AnswerReport], up: int, down: int) -> dict[str, float]:
        """The figures of a sample, from what the board measured and what the link carried."""
        seconds, tokens = sum(report.arrivals[-1] for report in reports), sum(len(report.ids) for report in reports)
        costs = Costs(*map(sum, zip(*(msgspec.structs.astuple(report.costs) for report in reports), strict=True)))
        device = make_device(self._bundle.manifest, place.board, link_conditions(place.link)[0].link.radio)
        joules = device.idle_watts * seconds
        joules += (device.busy_watts - device.idle_watts) * costs.draft_seconds
        joules += device.radio_watts * costs.exchange_seconds + device.joules_per_byte * (up + down)
        values = {
            PER_TOKEN.name: 1e3 * seconds / tokens,
            FIRST.name: 1e3 * sum(report.arrivals[0] for report in reports) / len(reports),
            UP.name: 100 * up / tokens,
            DOWN.name: 100 * down / tokens,
            BYTES.name: 100 * (up + down) / tokens,
            FORWARDS.name: costs.forwards / tokens,
            VERIFIER.name: 1e3 * costs.verifier_seconds / tokens,
            JOULES.name: 100 * joules / tokens,
        }
        if costs.drafted:
            values[ACCEPTED.name] = 100 * costs.accepted / costs.drafted
        if reports[0].draft_length:
            values[LENGTH.name] = reports[0].draft_length
        return values


def _log_path(name: str) -> Path:
    """The log of a process in the cloud; several processes may take samples at once."""
    return ROOT / "build" / "benchmarks" / f"{name}-{os.getpid()}.log"


@contextlib.asynccontextmanager
async def running(cases: Cases) -> AsyncIterator[Measure]:
    """Run the processes; see `Benchmark.running`."""
    if reason := missing_requirement():
        raise SystemExit(f"the links cannot be emulated: {reason}")
    (ROOT / "build" / "benchmarks").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(seed=1))
        comparison = Comparison(network, prepare_family(), stack)

        async def measure(scenario: Scenario, repetition: int) -> Values:
            return await comparison.measure(cases[scenario.key][1], repetition)

        yield measure


BENCHMARK = Benchmark(
    name="systems",
    title=f"Answers of {TOKENS} tokens by all systems",
    scenarios=tuple(scenario for scenario, _ in CASES.values()),
    running=lambda: running(CASES),
    repetitions=8,
    quick_repetitions=2,
    ratio_goals={place.title: make_goals(place) for place in PLACES},
    overviews=make_overviews(COMPARISONS),
)
