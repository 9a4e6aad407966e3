"""What goes wrong between a board and its verifier, over and over, while the board is asked for answers.

Each fault is a coroutine that strikes for ever, at its own pace and by the answers that are done; `run` asks, lets it
strike, and counts what came.
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

from tests.emulator.asking import Case, Judged, Kind, ask
from tests.emulator.middlebox import Done, Mischief
from tests.emulator.scene import Scene, Usage, Which
from tests.emulator.weather import steady

CALM = steady(0.02)
ASKERS = 4
WARM_UP = 12
# Seconds in which a process may let go of what a fault left it with.
SETTLING = 60.0
# What a process may hold more of, at the end: the feed's history fills, allocators keep some, connections are kept
# alive. Whether memory goes on growing is for an hour of load to tell.
RESIDENT_SLACK = 100 << 20
CALM_FILES, FILES_SLACK = 2, 8
# What an answer is to do without a verifier.
MODES = ("wait", "draft", "draft", "wait", "draft", "wait", "fail")
# A plan with drafts and streams in it, whatever the link.
PLAN = ("--num-assistant-tokens", "4", "--siblings", "2", "--cloud-tokens", "3", "--max-concurrent", str(ASKERS))


class Strikes:
    """What a fault goes by.

    Attributes:
        scene: what it breaks.
        count: how often it has struck.
        hit: answers that were under way when it did.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.count = self.hit = self.under_way = self.answered = 0
        self._random = Random(9)
        self._changed = asyncio.Event()

    def begin(self) -> None:
        self.under_way += 1

    def end(self) -> None:
        self.under_way -= 1
        self.answered += 1
        self._changed.set()

    async def after(self, answers: int) -> None:
        """Waits for so many more, and until the next one is somewhere in its middle; then it strikes."""
        wanted = self.answered + answers
        while self.answered < wanted:
            self._changed.clear()
            await self._changed.wait()
        await asyncio.sleep(self._random.uniform(0.0, 0.3))
        self.struck()

    def struck(self) -> None:
        self.count += 1
        self.hit += self.under_way


Strike = Callable[[Strikes], Coroutine[None, None, None]]


class Fault(msgspec.Struct, frozen=True):
    """One way in which things go wrong.

    Attributes:
        strike: never returns.
        box: the board goes through the middlebox.
        seconds: that it takes the board to notice and to get over one strike, at most; for deadlines.
        kills: whom it kills.
        losable: connections to the board may break.
        mischief: for the middlebox, all the time.
    """

    strike: Strike
    box: bool = False
    seconds: float = 30.0
    kills: Which | None = None
    losable: bool = False
    mischief: Mischief = Mischief()


async def _nothing(strikes: Strikes) -> None:
    await asyncio.Event().wait()


def _cable(seconds: float, every: int) -> Strike:
    async def strike(strikes: Strikes) -> None:
        network = strikes.scene.network
        while True:
            await strikes.after(every)
            network.pull()
            try:
                await asyncio.sleep(seconds)
            finally:
                network.plug()

    return strike


async def _loss(strikes: Strikes) -> None:
    strikes.scene.network.become(steady(0.02, loss=0.05))
    while True:
        await strikes.after(1)


async def _jumping(strikes: Strikes) -> None:
    while True:
        await strikes.after(5)
        strikes.scene.network.become(steady(0.6))
        await strikes.after(5)
        strikes.scene.network.become(CALM)


async def _verifier_dies(strikes: Strikes) -> None:
    while True:
        await strikes.after(6)
        strikes.scene.kill("verifier")
        await strikes.scene.start_verifier()


async def _board_dies(strikes: Strikes) -> None:
    while True:
        await strikes.after(6)
        await strikes.scene.restart_board()


async def _forgetting(strikes: Strikes) -> None:
    while True:
        await strikes.after(6)
        strikes.scene.network.forget()


async def _boxed(strikes: Strikes) -> None:
    """The middlebox does it, by chance, and counts."""
    while True:
        await strikes.after(1)


async def _unavailable(strikes: Strikes) -> None:
    """Some requests at all times, and sometimes all of them for a while."""
    while True:
        await strikes.after(5)
        strikes.scene.spoil(Mischief(refuse=1.0))
        await asyncio.sleep(1.5)
        strikes.scene.spoil(Mischief(refuse=0.2))


FAULTS = {
    "none": Fault(_nothing),
    "cable-1s": Fault(_cable(1.0, 4), seconds=20),
    "cable-4s": Fault(_cable(4.0, 4), seconds=30),
    "cable-10s": Fault(_cable(10.0, 20), seconds=60),
    "cable-60s": Fault(_cable(60.0, 60), seconds=180),
    "loss": Fault(_loss, seconds=60),
    "rtt-jumps": Fault(_jumping, seconds=60),
    "verifier-killed": Fault(_verifier_dies, seconds=60, kills="verifier"),
    "503": Fault(_unavailable, box=True, mischief=Mischief(refuse=0.2)),
    "half-open": Fault(_forgetting, seconds=90),
    "cut": Fault(_boxed, box=True, seconds=60, mischief=Mischief(cut=0.1, cut_raw=0.02)),
    "corrupted": Fault(_boxed, box=True, seconds=90, mischief=Mischief(corrupt=0.2, corrupt_raw=0.02)),
    "board-killed": Fault(_board_dies, seconds=60, kills="board", losable=True),
}


class Row(msgspec.Struct):
    """What came of one fault.

    Attributes:
        answers: by how they came out.
        codes: of typed errors.
        strikes, hit: how often it struck, and answers that were under way then.
        before, after: what board and verifier held; None for who was killed meanwhile.
        seconds: of all answers, in order.
        withdrawn: characters that the draft had said alone and that were taken back.
        details: of what should not have been.
        broken: promises that were, in words; nothing if all were kept.
    """

    name: str
    answers: Counter[Kind]
    codes: Counter[str]
    strikes: int
    hit: int
    before: dict[Which, Usage]
    after: dict[Which, Usage]
    seconds: list[float]
    withdrawn: int
    details: list[str]
    broken: list[str]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


async def run(
    scene: Scene,
    name: str,
    cases: Sequence[Case],
    answers: int,
    progress: Callable[[], None] = lambda: None,
    *,
    options: Sequence[str] = (),
    warm_up: int = WARM_UP,
    settling: float = SETTLING,
) -> Row:
    """Asks a fresh board of `scene` for so many answers while `FAULTS[name]` strikes.

    Args:
        progress: called behind every answer.
        options: more of them for the board.
        warm_up: answers before anything goes wrong.
        settling: seconds in which processes may let go of what they were left with.
    """
    fault = FAULTS[name]
    scene.network.become(CALM)
    scene.spoil(Mischief())
    await scene.start_board("--deadline", str(fault.seconds), *PLAN, *options, box=fault.box)
    strikes = Strikes(scene)
    limit = 3 * fault.seconds + 60
    numbers, judged = itertools.count(), list[Judged]()

    async def asking(client: httpx.AsyncClient, most: int, progress: Callable[[], None]) -> None:
        while (number := next(numbers)) < most:
            case = cases[number % len(cases)]
            await _awake(client)
            strikes.begin()
            # All ways in turn: streamed or whole, drafted or by the cloud alone.
            more: dict[str, Any] = {"on_link_loss": MODES[number % len(MODES)]}
            if number % 5 == 4:
                more["speculation"] = False
            judged.append(await ask(client, case, stream=number % 2 == 0, limit=limit, **more))
            strikes.end()
            progress()

    async def all_asking(most: int, progress: Callable[[], None]) -> None:
        async with _client(scene.url) as client:
            await asyncio.gather(*(asking(client, most, progress) for _ in range(ASKERS)))

    await all_asking(warm_up, lambda: None)
    warm, judged[:] = list(judged), []
    numbers = itertools.count()
    before = {which: scene.usage(which) for which in ("board", "verifier")}
    done = scene.spoil(fault.mischief)
    striking = asyncio.ensure_future(fault.strike(strikes))
    try:
        await all_asking(answers, progress)
    finally:
        striking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await striking
        scene.network.become(CALM)
    done = _less(scene.spoil(Mischief()), done)
    if done.total:
        strikes.count = strikes.hit = done.total
    after = await _settled(scene, before, fault.kills, settling)
    row = Row(
        name,
        Counter(each.kind for each in judged),
        Counter(each.code for each in judged if each.code),
        strikes.count,
        strikes.hit,
        before,
        after,
        sorted(each.seconds for each in judged),
        sum(each.withdrawn for each in judged),
        [
            f"{each.kind}: {each.code} {each.detail}".strip()
            for each in judged
            if each.kind not in (Kind.RIGHT, Kind.UNVERIFIED)
        ],
        [],
    )
    row.broken = list(_broken(fault, row))
    if any(each.kind != Kind.RIGHT for each in warm):
        row.broken.append("an answer went wrong before anything else did")
    return row


def _broken(fault: Fault, row: Row) -> list[str]:
    never = (Kind.HUNG, Kind.DIFFERENT, Kind.PASSED_OFF, Kind.UNTYPED)
    broken = [f"{row.answers[kind]} {kind}" for kind in never if row.answers[kind]]
    if row.answers[Kind.LOST] and not fault.losable:
        broken.append(f"{row.answers[Kind.LOST]} lost")
    if fault.strike is not _nothing and not row.hit:
        broken.append("nothing was struck: this proves nothing")
    for which, usage in row.after.items():
        grown = usage.resident - row.before[which].resident
        if grown > RESIDENT_SLACK:
            broken.append(f"{which} grew by {grown >> 20} MB")
        more = usage.files - row.before[which].files
        if more > FILES_SLACK:
            broken.append(f"{which} holds {more} more files")
    return broken


async def _settled(
    scene: Scene, before: dict[Which, Usage], killed: Which | None, seconds: float
) -> dict[Which, Usage]:
    """What those hold that were not killed, once they have let go of what they will."""
    left = [which for which in before if which != killed]
    end = asyncio.get_running_loop().time() + seconds
    while True:
        now = {which: scene.usage(which) for which in left}
        calm = all(usage.files <= before[which].files + CALM_FILES for which, usage in now.items())
        if calm or asyncio.get_running_loop().time() > end:
            return now
        await asyncio.sleep(0.25)


@contextlib.asynccontextmanager
async def _client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=ASKERS)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        yield client


async def _awake(client: httpx.AsyncClient) -> None:
    """Returns when the board answers: one that was killed takes a moment."""
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                return
        await asyncio.sleep(0.05)
    raise RuntimeError("the board does not come back")


def _less(done: Done, before: Done) -> Done:
    counts = zip(msgspec.structs.astuple(done), msgspec.structs.astuple(before), strict=True)
    return Done(*(now - then for now, then in counts))
