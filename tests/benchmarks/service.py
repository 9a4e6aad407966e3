"""Latency, memory and idle CPU of the local service: `python -m tests.benchmarks run service`.

    ready          from process start to the line that announces the URL
    first event    delay from the verifier's first bytes, as seen by a relay, to the client's first event
    memory, idle   resident memory and idle CPU of the service after the answers; CPU time of the process's own clock

Verifier, board, relay and client share the cores of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from tests.benchmarks.harness.benchmark import Benchmark, Measure, Quantity, Scenario, Values
from tests.toy_family import FAMILY

PROMPT = "def read_config(path):\n"
ANSWERS = 60
IDLE_SECONDS = 20.0
# HTTP/2 frames without an answer are shorter than this.
MIN_ANSWER_BYTES = 20


class Relay:
    """Forwards bytes between board and verifier.

    Attributes:
        received_at: times at which the verifier sent data, by `time.perf_counter`.
    """

    def __init__(self, port: int) -> None:
        self.received_at: list[float] = []
        self._port = port

    async def handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(reader, far_writer, False), self._copy(far_reader, writer, True))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if record and len(chunk) > MIN_ANSWER_BYTES:
                    self.received_at.append(time.perf_counter())
                writer.write(chunk)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def run_server(*arguments: str, log_file: Path | None = None) -> AsyncIterator[tuple[Process, str, float]]:
    """Run a server; yields its process, its URL, and the seconds until it announced the URL.

    Args:
        log_file: where its log goes; by default to this process's standard error.
    """
    started = time.perf_counter()
    with log_file.open("ab") if log_file else contextlib.nullcontext() as log:
        command = (sys.executable, "-m", *arguments, "--port", "0")
        server = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=log)
    assert server.stdout is not None
    try:
        url = (await server.stdout.readline()).decode().split()[-1]
        yield server, url, time.perf_counter() - started
    finally:
        server.terminate()
        await server.wait()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process by its own clock (clock_getcpuclockid(3)), which is finer than ticks."""
    return time.clock_gettime((~pid << 3) | 2)


def resident_bytes(pid: int) -> int:
    return _memory(pid, "VmRSS")


def peak_resident_bytes(pid: int) -> int:
    """The largest resident memory of a process since its start, or since it was reset."""
    return _memory(pid, "VmHWM")


def reset_peak_resident_bytes(pid: int) -> None:
    """Let the peak begin again at the present value, where the kernel can do that (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _memory(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


READY = Quantity("process start to ready", "s", goal=3.0)
FIRST_EVENT = Quantity("first event after the verifier's first bytes, median", "ms", digits=1, goal=30.0)
LATE_EVENT = Quantity("the same, 95 % of answers", "ms", digits=1, goal=30.0)
MEMORY = Quantity("resident memory after the answers", "MB", digits=0, goal=150.0)
IDLE = Quantity("idle CPU, share of a core", "%", goal=1.0)


async def measure_board(verifier: str, policy: str) -> Values:
    """Start a board, let it answer, and let it idle."""
    relay = Relay(int(verifier.rsplit(":", 1)[1]))
    listener = await asyncio.start_server(relay.handle_connection, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    options = ("serve", "--bundle", str(FAMILY / "bundle"), "--verifier", address, "--policy", policy)
    async with run_server("edge_runtime.cli", *options) as (board, url, ready), httpx.AsyncClient() as client:
        delays = []
        for seed in range(ANSWERS):
            body = {"prompt": PROMPT, "max_tokens": 24, "stream": True, "ignore_eos": True, "seed": seed}
            # Let the previous session be closed first, so that the reply to that is not counted.
            await asyncio.sleep(0.05)
            relay.received_at.clear()
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                delays.append(time.perf_counter() - relay.received_at[0])
                async for _ in lines:
                    pass
        memory = resident_bytes(board.pid)
        before = cpu_seconds(board.pid)
        await asyncio.sleep(IDLE_SECONDS)
        idle = (cpu_seconds(board.pid) - before) / IDLE_SECONDS
    # Close the listener only now, because closing waits for the board's connections.
    listener.close()
    # Leave out the first answer, which opened the connection.
    delays = sorted(delays[1:])
    return {
        READY.name: ready,
        FIRST_EVENT.name: 1e3 * statistics.median(delays),
        LATE_EVENT.name: 1e3 * delays[len(delays) * 19 // 20],
        MEMORY.name: memory / 1e6,
        IDLE.name: 100 * idle,
    }


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Measure]:
    options = ("serve", str(FAMILY / "target-v1"), "--threads", "1")
    async with run_server("cloud_verifier.cli", *options) as (_, url, _):

        async def measure(scenario: Scenario, _repetition: int) -> Values:
            return await measure_board(url, scenario.labels["policy"])

        yield measure


BENCHMARK = Benchmark(
    name="service",
    title="What the local service adds, takes and costs",
    scenarios=tuple(
        Scenario({"policy": policy}, (READY, FIRST_EVENT, LATE_EVENT, MEMORY, IDLE)) for policy in ("analytic", "fixed")
    ),
    running=running,
    repetitions=5,
    quick_repetitions=1,
)
