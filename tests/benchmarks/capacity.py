"""How many boards one verifier serves at a latency goal: `python -m tests.benchmarks run capacity`.

Boards ask one question after the other; a manner of serving them has room for as many as can do so at once while 95 %
of answers keep a time per token (after the first). The verifier, its HTTP and its texts are real, on this machine, with
clients on the same cores. A board's draft is replayed: which tokens the frozen draft proposes along each text is
computed once, and the time that a Raspberry Pi 5 takes for them is slept, like the round trip of a 4G link.

A simulation of the same boards knows one thing of the machine, the time of a forward by its rows, from the streaming
runs. Its error is shown beside what was measured; with it, the last table says how many verifiers a fleet needs whose
boards ask more by day than by night (modeled).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.bundle import read_bundle, read_chat_format
from edge_runtime.protocol.sampling import Sampling, common_prefix_length
from edge_runtime.service.chat_template import ChatTemplate
from edge_runtime.simulation.links import LINK_PRESETS
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.session import VerifierSession
from export.example_family.prepare import prepare_family
from tests.benchmarks.comparison.board import make_device
from tests.benchmarks.comparison.texts import QUESTIONS
from tests.benchmarks.harness.benchmark import Benchmark, Measure, Quantity, Scenario, Values
from tests.benchmarks.speed import run_verifier

TOKENS, TEMPERATURE, DRAFT_LENGTH = 48, 0.7, 4
LINK, BOARD = "4g", "raspberry-pi-5"
GOALS_MS = (60, 120)
# Boards at once. Chosen: about 1.4 times as many each time.
COUNTS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 180, 256)
# Answers with which a run ends, at least two for each board, and seconds after which it ends with fewer. Chosen.
MIN_ANSWERS, RUN_SECONDS = 30, 12.0
DEADLINE_SECONDS = 120.0
MANNERS = {
    "streaming": "streaming from the cloud",
    "speculating": "streaming, speculating in the cloud",
    "drafting": f"boards draft, K={DRAFT_LENGTH}",
}
# Of a modeled fleet: answers a day and board; the load by the hour is this share above and below its mean. Chosen.
ANSWERS_PER_DAY, ANSWER_TOKENS, DIURNAL_SWING = 50, 200, 0.8
FLEETS = (1_000, 10_000, 100_000)
SIMULATED_SECONDS = 60.0


class ReplayedText(NamedTuple):
    """A text, and what the draft proposes along it.

    Attributes:
        ids: of the answer.
        drafted: the draft's token at each position, after the true tokens before it.
    """

    prompt: list[int]
    seed: int
    ids: list[int]
    drafted: list[int]

    def accepted(self, position: int, length: int) -> int:
        """How many of `length` draft tokens are right at a position."""
        return common_prefix_length(self.ids[position:], self.drafted[position : position + length])


class RoundForwards(NamedTuple):
    """The target's forwards of one round: how many, and their seconds, with those of drafting on the verifier."""

    seconds: float
    count: int


class RunResult(NamedTuple):
    """What boards saw that were served at once.

    Attributes:
        seconds_per_token: of each answer, after its first tokens.
        forward_seconds: mean of the verifier's forwards.
        tokens_per_second: of all boards together.
    """

    seconds_per_token: list[float]
    forward_seconds: float
    tokens_per_second: float

    @property
    def slow_ms(self) -> float:
        """Milliseconds per token that 95 % of answers keep."""
        return 1e3 * float(np.quantile(self.seconds_per_token, 0.95))


class BoardTimes(NamedTuple):
    """Seconds that a board takes for a round apart from the verifier: of its draft and of the link."""

    draft: float
    link: float


async def record_text(client: VerifierClient, draft: OnnxDraft, prompt: list[int], seed: int) -> ReplayedText:
    """Let the target write a text, and the draft propose every token of it."""
    sampling = Sampling(TEMPERATURE, seed=seed, ignore_eos=True)
    session = VerifierSession(client, prompt, sampling)
    async for _ in session.run_round([], n=TOKENS, stream=True):
        pass
    session.close()
    ids, context = session.ids[len(prompt) :], draft.new_context()
    drafted = [context.propose(prompt + ids[:position], 1, sampling).tokens[0] for position in range(len(ids))]
    return ReplayedText(prompt, seed, ids, drafted)


class Boards:
    """Boards that ask one verifier."""

    def __init__(self, url: str, texts: Sequence[ReplayedText], times: BoardTimes) -> None:
        self._url, self._texts, self._times = url, texts, times

    async def run(self, count: int, *, drafts: bool) -> RunResult:
        """Let `count` boards ask at once."""
        answers: list[float] = []
        forwards: list[RoundForwards] = []
        started, numbers = time.monotonic(), itertools.count()
        until = started + RUN_SECONDS

        async def run_board(client: VerifierClient) -> None:
            # Boards do not begin all at once.
            await asyncio.sleep(next(numbers) / count)
            while time.monotonic() < until and len(answers) < max(MIN_ANSWERS, 2 * count):
                text = self._texts[next(numbers) % len(self._texts)]
                answers.append(await self._answer(client, text, forwards, drafts=drafts))

        async with VerifierClient(self._url, deadline=DEADLINE_SECONDS) as client:
            await client.models()
            await asyncio.gather(*(run_board(client) for _ in range(count)))
        forward_seconds = sum(each.seconds for each in forwards) / sum(each.count for each in forwards)
        return RunResult(answers, forward_seconds, TOKENS * len(answers) / (time.monotonic() - started))

    async def _answer(
        self, client: VerifierClient, text: ReplayedText, forwards: list[RoundForwards], *, drafts: bool
    ) -> float:
        """Generate a text; returns its seconds per token after the first ones."""
        session = VerifierSession(client, text.prompt, Sampling(TEMPERATURE, seed=text.seed, ignore_eos=True))
        first = first_tokens = 0.0
        while (done := len(session.ids) - len(text.prompt)) < TOKENS:
            draft = text.drafted[done : min(done + DRAFT_LENGTH, TOKENS - 1)] if drafts else []
            await asyncio.sleep(self._times.link + self._times.draft * len(draft))
            n = 1 if drafts else TOKENS - done
            async for update in session.run_round(draft, n=n, stream=not drafts):
                if not update.frame.more:
                    forwards.append(RoundForwards(update.frame.forward_100us / 1e4, 1 + update.frame.further))
                if not first:
                    first, first_tokens = time.monotonic(), len(update.accepted) + len(update.own)
        seconds = time.monotonic() - first
        assert session.ids[len(text.prompt) :] == text.ids, "the text depends on the load"
        session.close()
        return seconds / (TOKENS - first_tokens)


def simulate(
    count: int,
    texts: Sequence[ReplayedText],
    times: BoardTimes,
    forward_seconds: Callable[[int], float],
    *,
    drafts: bool,
) -> float:
    """Return the milliseconds per token that 95 % of answers keep, of boards that a simulated verifier serves.

    The verifier takes all rounds that wait into its next forward.

    Args:
        forward_seconds: of a forward, by its rows.
    """
    numbers = itertools.count()
    # Boards by the time at which their next round arrives: (time, board).
    arrivals = [(board / count, board) for board in range(count)]
    chosen, positions, begun = [0] * count, [0] * count, [0.0] * count
    answers: list[float] = []
    now = 0.0
    while now < SIMULATED_SECONDS:
        now = max(now, arrivals[0][0])
        batch = []
        while arrivals and arrivals[0][0] <= now:
            batch.append(heapq.heappop(arrivals)[1])
        lengths = [min(DRAFT_LENGTH, TOKENS - 1 - positions[board]) if drafts else 0 for board in batch]
        now += forward_seconds(len(batch) + sum(lengths))
        for board, length in zip(batch, lengths, strict=True):
            text = texts[chosen[board] % len(texts)]
            if not positions[board]:
                begun[board] = now
            positions[board] += 1 + (text.accepted(positions[board], length) if drafts else 0)
            pause = times.link + times.draft * DRAFT_LENGTH if drafts else 0.0
            if positions[board] >= TOKENS:
                answers.append((now - begun[board]) / (TOKENS - 1))
                chosen[board], positions[board] = next(numbers), 0
                pause = times.link
            heapq.heappush(arrivals, (now + pause, board))
    return 1e3 * float(np.quantile(answers, 0.95))


def find_capacity(slow_ms: Callable[[int], float], goal_ms: float) -> int:
    """Return the largest of COUNTS that keeps a goal, 0 if none does."""
    return max(itertools.takewhile(lambda count: slow_ms(count) <= goal_ms, COUNTS), default=0)


def verifiers_needed(boards: int, answer_seconds: float, capacity: int, seed: int) -> int:
    """Return how many verifiers serve a modeled fleet in all but one of 1,000 seconds of a day."""
    seconds = np.arange(86_400)
    rate = boards * ANSWERS_PER_DAY / 86_400 * (1 + DIURNAL_SWING * np.sin(2 * np.pi * seconds / 86_400))
    # Answers in progress, if nobody waits: Poisson, with the mean of Little's law.
    busy = np.random.default_rng(seed).poisson(rate * answer_seconds)
    return int(np.ceil(np.quantile(busy, 0.999) / capacity))


def capacity_quantity(goal_ms: int) -> Quantity:
    return Quantity(f"boards at {goal_ms} ms per token", digits=0, higher_is_better=True)


def simulated_quantity(goal_ms: int) -> Quantity:
    return Quantity(f"simulated at {goal_ms} ms", digits=0, higher_is_better=True)


RATE = Quantity(f"tokens per second at {GOALS_MS[-1]} ms", digits=0, higher_is_better=True)
ERROR = Quantity("error of the simulated time per token, median of all counts", "%", digits=0)
MEASURED = (*map(capacity_quantity, GOALS_MS), RATE)
SIMULATED = (*map(simulated_quantity, GOALS_MS), ERROR)
FLEET = {boards: Quantity(f"verifiers for {boards:,} boards", digits=0) for boards in FLEETS}
FLEET_TABLE = f"Verifiers that a fleet needs at {GOALS_MS[-1]} ms per token (modeled)"


def make_scenario(manner: str) -> Scenario:
    quantities = MEASURED if manner == "speculating" else MEASURED + SIMULATED
    return Scenario({"manner": MANNERS[manner]}, quantities, "Boards that one verifier serves", quick=False)


def make_fleet_scenario(manner: str) -> Scenario:
    return Scenario({"manner": MANNERS[manner]}, tuple(FLEET.values()), FLEET_TABLE, quick=False)


def compare_simulation(
    runs: Mapping[int, RunResult],
    streaming: Mapping[int, RunResult],
    texts: Sequence[ReplayedText],
    times: BoardTimes,
    *,
    drafts: bool,
) -> Values:
    """Simulate the boards of `runs`, and compare.

    Args:
        runs: by the number of boards.
        streaming: runs of streaming boards, whose forwards have a row for each.
    """
    rows, seconds = zip(*((count, run.forward_seconds) for count, run in streaming.items()), strict=True)
    slope = (seconds[-1] - seconds[0]) / max(1, rows[-1] - rows[0])

    def forward_seconds(count: int) -> float:
        return float(np.interp(count, rows, seconds)) + slope * max(0, count - rows[-1])

    @functools.cache
    def simulated_ms(count: int) -> float:
        return simulate(count, texts, times, forward_seconds, drafts=drafts)

    values: dict[str, float] = {simulated_quantity(goal).name: find_capacity(simulated_ms, goal) for goal in GOALS_MS}
    errors = [abs(simulated_ms(count) / run.slow_ms - 1) for count, run in runs.items()]
    return values | {ERROR.name: 100 * statistics.median(errors)}


class Capacity:
    """The verifiers, and what was measured of them in a repetition."""

    def __init__(self, family: Path, stack: contextlib.ExitStack) -> None:
        self._bundle = read_bundle((family / "bundle").resolve(), verify=False)
        options = ("--max-sessions", str(2 * COUNTS[-1]))
        target = family / "target-v1"
        plain = stack.enter_context(run_verifier(target, *options))
        speculating = stack.enter_context(run_verifier(target, *options, "--draft", str(self._bundle.path)))
        self._urls = {"streaming": plain, "speculating": speculating, "drafting": plain}
        device = make_device(self._bundle.manifest, BOARD, LINK_PRESETS[LINK].radio)
        self._times = BoardTimes(device.step_seconds, LINK_PRESETS[LINK].rtt_seconds)
        self._texts: list[ReplayedText] = []
        # By repetition and manner, then by the number of boards.
        self._runs: dict[tuple[int, str], dict[int, RunResult]] = {}

    async def prepare(self) -> None:
        """Record the texts."""
        draft = OnnxDraft(self._bundle, threads=1)
        template = ChatTemplate(read_chat_format(self._bundle), self._bundle.path)
        async with VerifierClient(self._urls["streaming"], deadline=DEADLINE_SECONDS) as client:
            for seed, question in enumerate(QUESTIONS):
                prompt = draft.tokenizer.encode(template.render([{"role": "user", "content": question}])).ids
                self._texts.append(await record_text(client, draft, prompt, seed))

    async def measure(self, manner: str, repetition: int) -> Values:
        """The figures of the first table."""
        runs = await self._run_counts(manner, repetition)
        values: dict[str, float] = {}
        for goal in GOALS_MS:
            values[capacity_quantity(goal).name] = find_capacity(lambda count: runs[count].slow_ms, goal)
        if largest := int(values[capacity_quantity(GOALS_MS[-1]).name]):
            values[RATE.name] = runs[largest].tokens_per_second
        if manner == "speculating":
            return values
        streaming = await self._run_counts("streaming", repetition)
        return values | compare_simulation(runs, streaming, self._texts, self._times, drafts=manner == "drafting")

    async def measure_fleet(self, manner: str, repetition: int) -> Values:
        """The figures of the second table, from the capacity measured in this repetition."""
        runs = await self._run_counts(manner, repetition)
        capacity = find_capacity(lambda count: runs[count].slow_ms, GOALS_MS[-1])
        if not capacity:
            return {}
        answer_seconds = ANSWER_TOKENS * runs[capacity].slow_ms / 1e3
        return {
            quantity.name: verifiers_needed(boards, answer_seconds, capacity, repetition)
            for boards, quantity in FLEET.items()
        }

    async def _run_counts(self, manner: str, repetition: int) -> dict[int, RunResult]:
        """Run more and more boards until not even the last goal is kept, once for each repetition."""
        if (repetition, manner) in self._runs:
            return self._runs[repetition, manner]
        runs: dict[int, RunResult] = {}
        boards = Boards(self._urls[manner], self._texts, self._times)
        for count in COUNTS:
            runs[count] = await boards.run(count, drafts=manner == "drafting")
            if runs[count].slow_ms > GOALS_MS[-1]:
                break
        self._runs[repetition, manner] = runs
        return runs


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Measure]:
    with contextlib.ExitStack() as stack:
        capacity = Capacity(prepare_family(), stack)
        await capacity.prepare()

        async def measure(scenario: Scenario, repetition: int) -> Values:
            manner = next(key for key, name in MANNERS.items() if name == scenario.labels["manner"])
            function = capacity.measure_fleet if scenario.table == FLEET_TABLE else capacity.measure
            return await function(manner, repetition)

        yield measure


BENCHMARK = Benchmark(
    name="capacity",
    title="Boards per verifier at a latency goal",
    scenarios=(*map(make_scenario, MANNERS), *map(make_fleet_scenario, MANNERS)),
    running=running,
    repetitions=3,
)
