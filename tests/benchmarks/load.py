"""The local service under mixed load: `python -m tests.benchmarks.load [--minutes 60]`.

Runs many kinds of clients at once: clients that check every text, streamed and whole; clients that leave in the middle,
read slowly or never, or vanish; clients that send half a request, nothing, or nonsense; and crowds that exceed the
admission limit. Board and verifier are real processes. Their resources are printed every minute. At the end it checks
the guarantees: every text is right, every refusal is typed, and neither memory nor open files grow. Exit code 1 if one
is broken.
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

from tests.benchmarks.service import run_server
from tests.emulator.answer_checker import AnswerCase, AnswerKind, make_cases, request_answer
from tests.emulator.test_bed import BUNDLE, TARGET, ProcessUsage

# Seconds after which an answer counts as hung; longer than any answer takes.
LIMIT = 60.0
# Allowed growth in bytes over the last two thirds of an hour; chosen. A shorter run is mostly warm-up, and may grow as
# much.
MAX_GROWTH_BYTES = 16 << 20
FILES_SLACK = 4
# Seconds in which the processes may close files after the load has ended; chosen.
SETTLING = 75.0
# Socket option for checkpoint and restore: the socket is closed without sending anything to the peer.
TCP_REPAIR = 19
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

# Body, content type, and status code of the expected refusal.
BadRequest = tuple[bytes, str, int]
BAD_REQUESTS: tuple[BadRequest, ...] = (
    (b"", "application/json", 400),
    (b"{", "application/json", 400),
    (b'"prompt"', "application/json", 400),
    (b"\xff\xfe", "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"prompt": 5.5}', "application/json", 400),
    (b'{"prompt": ""}', "application/json", 400),
    (b'{"prompt": "x", "temperature": -1}', "application/json", 400),
    (b'{"prompt": "x", "max_tokens": 1e300}', "application/json", 400),
    (b'{"prompt": "x", "use_beam_search": true}', "application/json", 400),
    (b'{"prompt": [1, 99999999]}', "application/json", 400),
    (b'{"prompt": "' + b"x" * 300_000 + b'"}', "application/json", 413),
    (b'{"prompt": "x"}', "text/plain", 415),
)


class Sample(msgspec.Struct, frozen=True):
    """The resources of board and verifier, `seconds` after the start."""

    seconds: float
    board: ProcessUsage
    verifier: ProcessUsage

    @property
    def files(self) -> tuple[int, int]:
        return self.board.files, self.verifier.files


class Load:
    """Runs all clients.

    Attributes:
        counts: number of events by name.
        broken: descriptions of broken guarantees.
    """

    def __init__(self, url: str, cases: Sequence[AnswerCase], seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self._url = url
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._cases = cases
        self._random = Random(seed)
        self._end = 0.0

    async def run(self, seconds: float) -> None:
        """Run all clients for `seconds`."""
        self._end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self._url, timeout=LIMIT, limits=limits) as client:
            await asyncio.gather(
                self._repeat(lambda: self._check(client, stream=True), 0.1),
                self._repeat(lambda: self._check(client, stream=False), 0.1),
                self._repeat(lambda: self._leave(client), 0.5),
                self._repeat(lambda: self._send_nonsense(client), 0.3),
                self._repeat(lambda: self._crowd(client), 6.0),
                self._repeat(lambda: self._watch(client), 4.0),
                self._repeat(self._read_slowly, 3.0),
                self._repeat(self._read_nothing, 3.0),
                self._repeat(self._vanish, 2.0),
                self._repeat(self._idle, 8.0),
            )

    async def _repeat(self, action: Callable[[], Awaitable[None]], pause: float) -> None:
        while time.monotonic() < self._end:
            try:
                async with asyncio.timeout(LIMIT):
                    await action()
            except TimeoutError:
                self.broken.append(f"{action} hung")
            except (httpx.TransportError, OSError) as error:
                self.broken.append(f"the board broke a connection: {error!r}")
            await asyncio.sleep(min(self._random.uniform(0.5, 1.5) * pause, max(0.0, self._end - time.monotonic())))

    async def _check(self, client: httpx.AsyncClient, *, stream: bool) -> None:
        case = self._random.choice(self._cases)
        checked = await request_answer(client, case, stream=stream, limit=LIMIT)
        refused = checked.kind == AnswerKind.ERROR and checked.code == "rate_limit_exceeded"
        self.counts["rate limited" if refused else str(checked.kind)] += 1
        if checked.kind != AnswerKind.RIGHT and not refused:
            self.broken.append(f"{checked.kind}: {checked.code} {checked.detail}")

    async def _leave(self, client: httpx.AsyncClient) -> None:
        """Disconnect in mid-stream, or before the answer."""
        body = self._random.choice(self._cases).fields | {"stream": True, "ignore_eos": True, "max_tokens": 200}
        if self._random.random() < 0.5:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.0, 0.3)):
                    await client.post("/v1/completions", json=body | {"stream": False})
        else:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
        self.counts["left"] += 1

    async def _send_nonsense(self, client: httpx.AsyncClient) -> None:
        content, content_type, status = self._random.choice(BAD_REQUESTS)
        response = await client.post("/v1/completions", content=content, headers={"content-type": content_type})
        self.counts["nonsense refused"] += 1
        try:
            typed = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            typed = ""
        # A request that only the draft model can validate is queued first, and may be refused with 429.
        if response.status_code not in (status, 429) or not typed:
            self.broken.append(
                f"{content[:40]!r} as {content_type} was answered {response.status_code}: {response.text[:80]}"
            )

    async def _crowd(self, client: httpx.AsyncClient) -> None:
        """Send more requests at once than the service admits and queues."""
        body = self._cases[0].fields | {"max_tokens": 8}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(16)))
        for answer in answers:
            self.counts[f"crowd {answer.status_code}"] += 1
            asked_to_retry = answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
            if answer.status_code != 200 and not asked_to_retry:
                self.broken.append(f"a request of a crowd was answered {answer.status_code}: {answer.text[:80]}")

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Read the metrics, and the event stream for two seconds."""
        assert (await client.get("/metrics")).status_code == 200
        async with client.stream("GET", "/events") as response:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    async for _ in response.aiter_lines():
                        pass
        self.counts["watched"] += 1

    async def _read_slowly(self) -> None:
        """Read single bytes slowly, with a tiny receive window."""
        reader, writer = await self._open_stream()
        for _ in range(6):
            await reader.read(1)
            await asyncio.sleep(0.5)
        writer.close()
        self.counts["read slowly"] += 1

    async def _read_nothing(self) -> None:
        _, writer = await self._open_stream()
        await asyncio.sleep(3.0)
        writer.close()
        self.counts["read nothing"] += 1

    async def _vanish(self) -> None:
        """Disappear without closing the connection; send a reset if the kernel does not permit that."""
        _, writer = await self._open_stream()
        await asyncio.sleep(self._random.uniform(0.0, 0.2))
        raw = writer.get_extra_info("socket")
        try:
            raw.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except OSError:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        self.counts["vanished"] += 1

    async def _idle(self) -> None:
        """Open 200 connections that send half a request or nothing."""
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

    async def _open_stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Request a stream on a raw connection with a small receive window."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (self._host, self._port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=64)
        fields = self._random.choice(self._cases).fields | {"stream": True, "ignore_eos": True, "max_tokens": 200}
        body = json.dumps(fields)
        writer.write(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode())
        return reader, writer


async def measure(
    seconds: float, interval: float, cases: Sequence[AnswerCase], on_sample: Callable[[Sample, Counter[str]], None]
) -> tuple[Load, list[Sample]]:
    """Run the load. Return it with samples of the resources: before it, every `interval` seconds, and once settled."""
    verifier_options = ("serve", str(TARGET), "--threads", "1")
    async with run_server("cloud_verifier.cli", *verifier_options) as (verifier, address, _):
        options = ("serve", "--bundle", str(BUNDLE), "--threads", "1", "--verifier", address)
        # A queue that the crowd exceeds.
        options += ("--max-waiting", "8", "--max-new-tokens", "1024")
        async with run_server("edge_runtime.cli", *options, "--log-level", "error") as (board, url, _):
            started = time.monotonic()

            def sample() -> Sample:
                return Sample(
                    time.monotonic() - started, ProcessUsage.from_pid(board.pid), ProcessUsage.from_pid(verifier.pid)
                )

            load = Load(url, cases)
            warm_up = Load(url, cases)
            await warm_up.run(min(60.0, seconds / 3))
            load.broken += warm_up.broken
            # The baseline is taken after a warm-up, which fills caches and connection pools.
            samples = [await _wait_settled(sample, None)]
            running = asyncio.create_task(load.run(seconds))
            while not running.done():
                await asyncio.wait({running}, timeout=interval)
                samples.append(sample())
                on_sample(samples[-1], load.counts)
            await running
            samples.append(await _wait_settled(sample, samples[0]))
            async with httpx.AsyncClient(base_url=url) as client:
                page = (await client.get("/metrics")).text
            for line in page.splitlines():
                if line.startswith(("flexspec_requests_running", "flexspec_requests_waiting")) and float(
                    line.split()[-1]
                ):
                    load.broken.append(f"no client is left, but the board reports {line}")
    return load, samples


async def _wait_settled(sample: Callable[[], Sample], baseline: Sample | None) -> Sample:
    """Return a sample once the open files are down to `baseline`, or after a fixed time."""
    end = time.monotonic() + (SETTLING if baseline else 12.0)
    while time.monotonic() < end:
        now = sample()
        if baseline and all(
            files <= before + FILES_SLACK for files, before in zip(now.files, baseline.files, strict=True)
        ):
            break
        await asyncio.sleep(0.5)
    return sample()


def find_broken_guarantees(samples: Sequence[Sample], growth: int = MAX_GROWTH_BYTES) -> list[str]:
    """Describe the broken guarantees on memory and open files."""
    first, *during, last = samples
    broken = []
    for name in ("board", "verifier"):
        before, after = getattr(first, name), getattr(last, name)
        if after.files > before.files + FILES_SLACK:
            broken.append(f"the {name} holds {after.files} open files, {before.files} at the start")
        late = during[len(during) // 3 :]
        gain = fit_slope([sample.seconds for sample in late], [getattr(sample, name).resident for sample in late])
        gain *= late[-1].seconds - late[0].seconds
        if gain > growth:
            broken.append(f"the {name} grew by {gain / 2**20:.1f} MB after the first third")
    return broken


def fit_slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the least-squares line."""
    return statistics.linear_regression(times, values).slope if len(set(times)) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="duration (default: %(default)g)")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    console = Console(width=120)
    with Progress(console=console) as progress:
        task = progress.add_task("load", total=seconds)

        def print_sample(sample: Sample, counts: Counter[str]) -> None:
            progress.update(task, completed=sample.seconds)
            usages = (
                f"{usage.resident / 2**20:.0f} MB, {usage.files} files" for usage in (sample.board, sample.verifier)
            )
            console.print(
                "{:5.1f} min: board {}; verifier {}; {} right".format(
                    sample.seconds / 60, *usages, counts[str(AnswerKind.RIGHT)]
                )
            )

        load, samples = asyncio.run(measure(seconds, min(60.0, seconds / 6), make_cases(TARGET), print_sample))
    console.print(", ".join(f"{count} {name}" for name, count in sorted(load.counts.items())))
    broken = load.broken[:20] + find_broken_guarantees(samples)
    for sentence in broken:
        console.print(f"broken: {sentence}", style="red")
    console.print("all guarantees held" if not broken else f"{len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
