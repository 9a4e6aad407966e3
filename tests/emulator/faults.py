"""Injects faults between a board and its verifier while the board answers requests.

Each fault is a coroutine that strikes again and again, paced by the number of completed answers; `run_fault` sends the
requests, lets the fault strike, and counts the results.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from random import Random
from typing import Any

import httpx
import msgspec

from tests.emulator.answer_checker import AnswerCase, AnswerKind, CheckedAnswer, request_answer
from tests.emulator.link_conditions import steady_conditions
from tests.emulator.middlebox import FaultCounts, FaultRates
from tests.emulator.test_bed import ProcessName, ProcessUsage, TestBed

CALM = steady_conditions(0.02)
CLIENTS = 4
WARM_UP = 12
# Time after a fault in which a process may release memory and files; chosen.
SETTLING = 60.0
# Allowed growth of a process: the event history fills, allocators retain memory, connections are kept alive. Chosen;
# unbounded growth is detected by an hour of `tests.benchmarks.load`.
RESIDENT_SLACK = 100 << 20
CALM_FILES, FILES_SLACK = 2, 8
# Values of `on_link_loss`, used in turn.
MODES = ("wait", "draft", "draft", "wait", "draft", "wait", "fail")
# A fixed plan that both drafts and streams on any link.
PLAN = ("--num-assistant-tokens", "4", "--siblings", "2", "--cloud-tokens", "3", "--max-concurrent", str(CLIENTS))


class FaultContext:
    """The state that a fault reads to pace its strikes, and the count of its strikes.

    Attributes:
        test_bed: the processes and the link that the fault breaks.
        count: number of strikes.
        hit: number of answers in progress when it struck.
        in_progress: number of answers in progress now.
        answered: number of completed answers.
    """

    def __init__(self, test_bed: TestBed) -> None:
        self.test_bed = test_bed
        self.count = self.hit = self.in_progress = self.answered = 0
        self._random = Random(9)
        self._changed = asyncio.Event()

    def begin(self) -> None:
        self.in_progress += 1

    def end(self) -> None:
        self.in_progress -= 1
        self.answered += 1
        self._changed.set()

    async def after(self, answers: int) -> None:
        """Wait for `answers` more completed answers, then until the next one is about half done, and count a strike."""
        target = self.answered + answers
        while self.answered < target:
            self._changed.clear()
            await self._changed.wait()
        await asyncio.sleep(self._random.uniform(0.0, 0.3))
        self.record_strike()

    def record_strike(self) -> None:
        self.count += 1
        self.hit += self.in_progress


Strike = Callable[[FaultContext], Coroutine[None, None, None]]


class InjectedFault(msgspec.Struct, frozen=True):
    """One kind of fault.

    Attributes:
        strike: the coroutine that strikes; it never returns.
        box: whether the board reaches the verifier through the middlebox.
        seconds: the longest time that the board needs to detect one strike and recover; used for deadlines.
        kills: the process that it kills, if any.
        losable: whether connections to the board may break.
        fault_rates: rates of the middlebox throughout the run.
    """

    strike: Strike
    box: bool = False
    seconds: float = 30.0
    kills: ProcessName | None = None
    losable: bool = False
    fault_rates: FaultRates = FaultRates()


async def _no_fault(context: FaultContext) -> None:
    await asyncio.Event().wait()


def _unplug(seconds: float, every: int) -> Strike:
    async def strike(context: FaultContext) -> None:
        network = context.test_bed.network
        while True:
            await context.after(every)
            network.unplug()
            try:
                await asyncio.sleep(seconds)
            finally:
                network.replug()

    return strike


async def _packet_loss(context: FaultContext) -> None:
    context.test_bed.network.set_conditions(steady_conditions(0.02, loss=0.05))
    while True:
        await context.after(1)


async def _rtt_jumps(context: FaultContext) -> None:
    while True:
        await context.after(5)
        context.test_bed.network.set_conditions(steady_conditions(0.6))
        await context.after(5)
        context.test_bed.network.set_conditions(CALM)


async def _kill_verifier(context: FaultContext) -> None:
    while True:
        await context.after(6)
        context.test_bed.kill("verifier")
        await context.test_bed.start_verifier()


async def _kill_board(context: FaultContext) -> None:
    while True:
        await context.after(6)
        await context.test_bed.restart_board()


async def _forget_connections(context: FaultContext) -> None:
    while True:
        await context.after(6)
        context.test_bed.network.forget_connections()


async def _middlebox_only(context: FaultContext) -> None:
    """Only count strikes: the middlebox injects the faults at random and counts them itself."""
    while True:
        await context.after(1)


async def _unavailable(context: FaultContext) -> None:
    """Refuse some requests at all times, and from time to time all of them for 1.5 seconds."""
    while True:
        await context.after(5)
        context.test_bed.set_fault_rates(FaultRates(refuse=1.0))
        await asyncio.sleep(1.5)
        context.test_bed.set_fault_rates(FaultRates(refuse=0.2))


FAULTS = {
    "none": InjectedFault(_no_fault),
    "cable-1s": InjectedFault(_unplug(1.0, 4), seconds=20),
    "cable-4s": InjectedFault(_unplug(4.0, 4), seconds=30),
    "cable-10s": InjectedFault(_unplug(10.0, 20), seconds=60),
    "cable-60s": InjectedFault(_unplug(60.0, 60), seconds=180),
    "loss": InjectedFault(_packet_loss, seconds=60),
    "rtt-jumps": InjectedFault(_rtt_jumps, seconds=60),
    "verifier-killed": InjectedFault(_kill_verifier, seconds=60, kills="verifier"),
    "503": InjectedFault(_unavailable, box=True, fault_rates=FaultRates(refuse=0.2)),
    "half-open": InjectedFault(_forget_connections, seconds=90),
    "cut": InjectedFault(_middlebox_only, box=True, seconds=60, fault_rates=FaultRates(cut=0.1, cut_raw=0.02)),
    "corrupted": InjectedFault(
        _middlebox_only, box=True, seconds=90, fault_rates=FaultRates(corrupt=0.2, corrupt_raw=0.02)
    ),
    "board-killed": InjectedFault(_kill_board, seconds=60, kills="board", losable=True),
}


class FaultResult(msgspec.Struct):
    """Results under one fault.

    Attributes:
        answers: number of answers by kind.
        codes: number of typed errors by code.
        strikes, hit: number of strikes, and of answers in progress at those times.
        before, after: resources of board and verifier; a process that was killed is missing from `after`.
        seconds: latencies of all answers, ascending.
        withdrawn: number of unverified characters that were later withdrawn.
        details: descriptions of the answers that were neither right nor marked as unverified.
        broken: descriptions of broken guarantees; empty if all held.
    """

    name: str
    answers: Counter[AnswerKind]
    codes: Counter[str]
    strikes: int
    hit: int
    before: dict[ProcessName, ProcessUsage]
    after: dict[ProcessName, ProcessUsage]
    seconds: list[float]
    withdrawn: int
    details: list[str]
    broken: list[str]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


async def run_fault(
    test_bed: TestBed,
    name: str,
    cases: Sequence[AnswerCase],
    answers: int,
    progress: Callable[[], None] = lambda: None,
    *,
    options: Sequence[str] = (),
    warm_up: int = WARM_UP,
    settling: float = SETTLING,
) -> FaultResult:
    """Request `answers` answers from a newly started board of `test_bed` while `FAULTS[name]` strikes.

    Args:
        progress: called after every answer.
        options: additional command-line options of the board.
        warm_up: number of answers before the first strike.
        settling: seconds after the run in which processes may release memory and files.
    """
    fault = FAULTS[name]
    test_bed.network.set_conditions(CALM)
    test_bed.set_fault_rates(FaultRates())
    await test_bed.start_board("--deadline", str(fault.seconds), *PLAN, *options, box=fault.box)
    context = FaultContext(test_bed)
    limit = 3 * fault.seconds + 60
    numbers, checked = itertools.count(), list[CheckedAnswer]()

    async def run_client(client: httpx.AsyncClient, count: int, progress: Callable[[], None]) -> None:
        while (number := next(numbers)) < count:
            case = cases[number % len(cases)]
            await _wait_ready(client)
            context.begin()
            # Cover all combinations in turn: streamed or not, with drafts or from the cloud only.
            extra_fields: dict[str, Any] = {"on_link_loss": MODES[number % len(MODES)]}
            if number % 5 == 4:
                extra_fields["speculation"] = False
            checked.append(await request_answer(client, case, stream=number % 2 == 0, limit=limit, **extra_fields))
            context.end()
            progress()

    async def run_clients(count: int, progress: Callable[[], None]) -> None:
        async with _open_client(test_bed.url) as client:
            await asyncio.gather(*(run_client(client, count, progress) for _ in range(CLIENTS)))

    await run_clients(warm_up, lambda: None)
    warm_up_answers, checked[:] = list(checked), []
    numbers = itertools.count()
    names: tuple[ProcessName, ...] = ("board", "verifier")
    before = {which: test_bed.usage(which) for which in names}
    counts_before = test_bed.set_fault_rates(fault.fault_rates)
    striking = asyncio.ensure_future(fault.strike(context))
    try:
        await run_clients(answers, progress)
    finally:
        striking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await striking
        test_bed.network.set_conditions(CALM)
    injected = _subtract(test_bed.set_fault_rates(FaultRates()), counts_before)
    if injected.total:
        context.count = context.hit = injected.total
    after = await _wait_settled(test_bed, before, fault.kills, settling)
    row = FaultResult(
        name=name,
        answers=Counter(answer.kind for answer in checked),
        codes=Counter(answer.code for answer in checked if answer.code),
        strikes=context.count,
        hit=context.hit,
        before=before,
        after=after,
        seconds=sorted(answer.seconds for answer in checked),
        withdrawn=sum(answer.withdrawn for answer in checked),
        details=[
            f"{answer.kind}: {answer.code} {answer.detail}".strip()
            for answer in checked
            if answer.kind not in (AnswerKind.RIGHT, AnswerKind.UNVERIFIED)
        ],
        broken=[],
    )
    row.broken = list(_find_broken_guarantees(fault, row))
    if any(answer.kind != AnswerKind.RIGHT for answer in warm_up_answers):
        row.broken.append("an answer of the warm-up was not right")
    return row


def _find_broken_guarantees(fault: InjectedFault, row: FaultResult) -> list[str]:
    never = (AnswerKind.HUNG, AnswerKind.DIFFERENT, AnswerKind.PASSED_OFF, AnswerKind.UNTYPED)
    broken = [f"{row.answers[kind]} {kind}" for kind in never if row.answers[kind]]
    if row.answers[AnswerKind.LOST] and not fault.losable:
        broken.append(f"{row.answers[AnswerKind.LOST]} lost")
    if fault.strike is not _no_fault and not row.hit:
        broken.append("the fault hit no answer, so the run proves nothing")
    for which, usage in row.after.items():
        grown = usage.resident - row.before[which].resident
        if grown > RESIDENT_SLACK:
            broken.append(f"{which} grew by {grown >> 20} MB")
        more_files = usage.files - row.before[which].files
        if more_files > FILES_SLACK:
            broken.append(f"{which} holds {more_files} more files")
    return broken


async def _wait_settled(
    test_bed: TestBed, before: dict[ProcessName, ProcessUsage], killed: ProcessName | None, seconds: float
) -> dict[ProcessName, ProcessUsage]:
    """Return the resources of the processes that were not killed, once their open files are down to `before` or after
    `seconds`."""
    alive = [which for which in before if which != killed]
    end = asyncio.get_running_loop().time() + seconds
    while True:
        now = {which: test_bed.usage(which) for which in alive}
        settled = all(usage.files <= before[which].files + CALM_FILES for which, usage in now.items())
        if settled or asyncio.get_running_loop().time() > end:
            return now
        await asyncio.sleep(0.25)


@contextlib.asynccontextmanager
async def _open_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        yield client


async def _wait_ready(client: httpx.AsyncClient) -> None:
    """Wait until the board is ready; one that was killed takes a moment to restart."""
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                return
        await asyncio.sleep(0.05)
    raise RuntimeError("the board did not become ready again")


def _subtract(counts: FaultCounts, before: FaultCounts) -> FaultCounts:
    pairs = zip(msgspec.structs.astuple(counts), msgspec.structs.astuple(before), strict=True)
    return FaultCounts(*(now - then for now, then in pairs))
