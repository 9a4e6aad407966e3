"""A board's service under mixed load: `python -m tests.benchmarks.load [--minutes 60]`.

At once, for as long as it takes: who asks and checks every text, streamed and whole; who leaves in the middle; who
reads slowly, or never; who vanishes; who sends half a request, or nothing, or nonsense; and crowds that are told to
come back. A real board and a real verifier, each in a process of its own. Every minute what they hold; in the end a
verdict: every text right, every refusal typed, and neither memory nor open files growing. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from random import Random

import httpx
import msgspec
from rich.console import Console
from rich.progress import Progress

from tests.benchmarks.service import process
from tests.emulator.answer_checker import AnswerCase, AnswerKind, make_cases, request_answer
from tests.emulator.test_bed import BUNDLE, TARGET, Usage

# One that leaves nobody for longer than any answer takes.
LIMIT = 60.0
# What the last two thirds of an hour may add, in bytes; a shorter run is mostly warming up, and may add as much.
GROWTH = 16 << 20
FILES_SLACK = 4
SETTLING = 75.0
# Says to the kernel that a socket is being moved, and may be closed without a word to the peer.
TCP_REPAIR = 19
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

Bad = tuple[bytes, str, int]
BAD_BODIES: tuple[Bad, ...] = (
    (b"", "application/json", 400),
    (b"{", "application/json", 400),
    (b'"prompt"', "application/json", 400),
    (b"\xff\xfe", "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"prompt": 5.5}', "application/json", 400),
    (b'{"prompt": ""}', "application/json", 400),
    (b'{"prompt": "x", "temperature": -1}', "application/json", 400),
    (b'{"prompt": "x", "max_tokens": 1e300}', "application/json", 400),
    (b'{"prompt": "x", "nonsense": true}', "application/json", 400),
    (b'{"prompt": [1, 99999999]}', "application/json", 400),
    (b'{"prompt": "' + b"x" * 300_000 + b'"}', "application/json", 413),
    (b'{"prompt": "x"}', "text/plain", 415),
)


class Sample(msgspec.Struct, frozen=True):
    """What the processes held, `seconds` after the start."""

    seconds: float
    board: Usage
    verifier: Usage

    @property
    def files(self) -> tuple[int, int]:
        return self.board.files, self.verifier.files


class Load:
    """All clients together.

    Attributes:
        counts: what happened, by its name.
        broken: promises that were not kept, in words.
    """

    def __init__(self, url: str, known: Sequence[AnswerCase], seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self._url = url
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._known = known
        self._random = Random(seed)
        self._end = 0.0

    async def run(self, seconds: float) -> None:
        """All of it, for so long."""
        self._end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self._url, timeout=LIMIT, limits=limits) as client:
            await asyncio.gather(
                self._over_and_over(lambda: self._check(client, stream=True), 0.1),
                self._over_and_over(lambda: self._check(client, stream=False), 0.1),
                self._over_and_over(lambda: self._leave(client), 0.5),
                self._over_and_over(lambda: self._nonsense(client), 0.3),
                self._over_and_over(lambda: self._crowd(client), 6.0),
                self._over_and_over(lambda: self._watch(client), 4.0),
                self._over_and_over(self._read_slowly, 3.0),
                self._over_and_over(self._read_nothing, 3.0),
                self._over_and_over(self._vanish, 2.0),
                self._over_and_over(self._idle, 8.0),
            )

    async def _over_and_over(self, act: Callable[[], Awaitable[None]], pause: float) -> None:
        while time.monotonic() < self._end:
            try:
                async with asyncio.timeout(LIMIT):
                    await act()
            except TimeoutError:
                self.broken.append(f"{act} hung")
            except (httpx.TransportError, OSError) as error:
                self.broken.append(f"the board broke a connection: {error!r}")
            await asyncio.sleep(min(self._random.uniform(0.5, 1.5) * pause, max(0.0, self._end - time.monotonic())))

    async def _check(self, client: httpx.AsyncClient, *, stream: bool) -> None:
        case = self._random.choice(self._known)
        judged = await request_answer(client, case, stream=stream, limit=LIMIT)
        told_to_wait = judged.kind == AnswerKind.ERROR and judged.code == "rate_limit_exceeded"
        self.counts["told to come back" if told_to_wait else str(judged.kind)] += 1
        if judged.kind != AnswerKind.RIGHT and not told_to_wait:
            self.broken.append(f"{judged.kind}: {judged.code} {judged.detail}")

    async def _leave(self, client: httpx.AsyncClient) -> None:
        """In mid-stream, or before anything was said."""
        body = self._random.choice(self._known).fields | {"stream": True, "ignore_eos": True, "max_tokens": 200}
        if self._random.random() < 0.5:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.0, 0.3)):
                    await client.post("/v1/completions", json=body | {"stream": False})
        else:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
        self.counts["left"] += 1

    async def _nonsense(self, client: httpx.AsyncClient) -> None:
        content, kind, status = self._random.choice(BAD_BODIES)
        response = await client.post("/v1/completions", content=content, headers={"content-type": kind})
        self.counts["nonsense refused"] += 1
        try:
            typed = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            typed = ""
        # What only the draft can judge waits in line for it.
        if response.status_code not in (status, 429) or not typed:
            self.broken.append(f"{content[:40]!r} as {kind} was answered {response.status_code}: {response.text[:80]}")

    async def _crowd(self, client: httpx.AsyncClient) -> None:
        """More at once than there are places and room to wait."""
        body = self._known[0].fields | {"max_tokens": 8}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(16)))
        for answer in answers:
            self.counts[f"crowd {answer.status_code}"] += 1
            waits = answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
            if answer.status_code != 200 and not waits:
                self.broken.append(f"one of many was answered {answer.status_code}: {answer.text[:80]}")

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """The feed and the metrics, for a moment."""
        assert (await client.get("/metrics")).status_code == 200
        async with client.stream("GET", "/events") as response:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    async for _ in response.aiter_lines():
                        pass
        self.counts["watched"] += 1

    async def _read_slowly(self) -> None:
        """A byte now and then, out of a window of nothing."""
        reader, writer = await self._stream()
        for _ in range(6):
            await reader.read(1)
            await asyncio.sleep(0.5)
        writer.close()
        self.counts["read slowly"] += 1

    async def _read_nothing(self) -> None:
        _, writer = await self._stream()
        await asyncio.sleep(3.0)
        writer.close()
        self.counts["read nothing"] += 1

    async def _vanish(self) -> None:
        """Without a farewell; where that is not allowed, with a reset."""
        _, writer = await self._stream()
        await asyncio.sleep(self._random.uniform(0.0, 0.2))
        raw = writer.get_extra_info("socket")
        try:
            raw.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except OSError:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        self.counts["vanished"] += 1

    async def _idle(self) -> None:
        """Hundreds of connections with half a request on them, or none."""
        half = HEAD + 'content-length: 10\r\n\r\n{"p'
        writers = []
        for index in range(200):
            _, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(half.encode() if index % 2 else b"")
            writers.append(writer)
        await asyncio.sleep(2.0)
        for writer in writers:
            writer.close()
        self.counts["idle connections"] += len(writers)

    async def _stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request for a stream on a bare connection with a small window."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (self._host, self._port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=64)
        asked = self._random.choice(self._known).fields | {"stream": True, "ignore_eos": True, "max_tokens": 200}
        body = json.dumps(asked)
        writer.write(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode())
        return reader, writer


async def measure(
    seconds: float, every: float, known: Sequence[AnswerCase], tell: Callable[[Sample, Counter[str]], None]
) -> tuple[Load, list[Sample]]:
    """The load, and samples of what board and verifier held: before, every so often, and once all is quiet."""
    verifier_options = ("serve", str(TARGET), "--threads", "1")
    async with process("cloud_verifier.cli", *verifier_options) as (verifier, address, _):
        options = ("serve", "--bundle", str(BUNDLE), "--threads", "1", "--verifier", address)
        async with process("edge_runtime.cli", *options, "--log-level", "error") as (board, url, _):
            started = time.monotonic()

            def sample() -> Sample:
                return Sample(time.monotonic() - started, Usage.from_pid(board.pid), Usage.from_pid(verifier.pid))

            load = Load(url, known)
            warm_up = Load(url, known)
            await warm_up.run(min(60.0, seconds / 3))
            load.broken += warm_up.broken
            # What a first hour of crowds left open is not what counts.
            samples = [await _quiet(sample, None)]
            running = asyncio.create_task(load.run(seconds))
            while not running.done():
                await asyncio.wait({running}, timeout=every)
                samples.append(sample())
                tell(samples[-1], load.counts)
            await running
            samples.append(await _quiet(sample, samples[0]))
            async with httpx.AsyncClient(base_url=url) as client:
                page = (await client.get("/metrics")).text
            for line in page.splitlines():
                if line.startswith(("flexspec_requests_running", "flexspec_requests_waiting")) and float(
                    line.split()[-1]
                ):
                    load.broken.append(f"all have gone, and the board says {line}")
    return load, samples


async def _quiet(sample: Callable[[], Sample], wanted: Sample | None) -> Sample:
    """What is held once it is no more than what is `wanted`, or falls no more."""
    end = time.monotonic() + (SETTLING if wanted else 12.0)
    while time.monotonic() < end:
        now = sample()
        if wanted and all(held <= most + FILES_SLACK for held, most in zip(now.files, wanted.files, strict=True)):
            break
        await asyncio.sleep(0.5)
    return sample()


def verdict(samples: Sequence[Sample], growth: int = GROWTH) -> list[str]:
    """Promises that were broken, in words."""
    first, *during, last = samples
    broken = []
    for name in ("board", "verifier"):
        before, after = getattr(first, name), getattr(last, name)
        if after.files > before.files + FILES_SLACK:
            broken.append(f"the {name} holds {after.files} files, and began with {before.files}")
        late = during[len(during) // 3 :]
        gained = slope([each.seconds for each in late], [getattr(each, name).resident for each in late])
        gained *= late[-1].seconds - late[0].seconds
        if gained > growth:
            broken.append(f"the {name} grew by {gained / 2**20:.1f} MB behind its first third")
    return broken


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the line that fits best."""
    return statistics.linear_regression(times, values).slope if len(set(times)) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="default: %(default)g")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    console = Console(width=120)
    with Progress(console=console) as progress:
        task = progress.add_task("load", total=seconds)

        def tell(sample: Sample, counts: Counter[str]) -> None:
            progress.update(task, completed=sample.seconds)
            held = (
                f"{usage.resident / 2**20:.0f} MB, {usage.files} files" for usage in (sample.board, sample.verifier)
            )
            console.print(
                "{:5.1f} min: board {}; verifier {}; {} right".format(
                    sample.seconds / 60, *held, counts[str(AnswerKind.RIGHT)]
                )
            )

        load, samples = asyncio.run(measure(seconds, min(60.0, seconds / 6), make_cases(TARGET), tell))
    console.print(", ".join(f"{count} {name}" for name, count in sorted(load.counts.items())))
    broken = load.broken[:20] + verdict(samples)
    for sentence in broken:
        console.print(f"broken: {sentence}", style="red")
    console.print("all promises kept" if not broken else f"{len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
