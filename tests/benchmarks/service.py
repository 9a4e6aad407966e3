"""What the local service adds to a verifier's answer, and what it costs to keep: `python -m tests.benchmarks.service`.

    ready          process start to the line that says so
    first event    at a client, behind the verifier's first bytes, which a relay between board and verifier sees
    memory, idle   of the service's process, after answering; CPU time by the scheduler's own account

Verifier, board, relay and client share this machine's cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.benchmarks.speed import FAMILY

PROMPT = "def read_config(path):\n"
ANSWERS = 60
IDLE_SECONDS = 20.0
# Frames of HTTP/2 that carry no answer are shorter.
LEAST_BYTES = 20


class Relay:
    """Passes bytes between board and verifier.

    Attributes:
        heard: when the verifier sent something, by `time.perf_counter`.
    """

    def __init__(self, port: int) -> None:
        self.heard: list[float] = []
        self._port = port

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(reader, far_writer, False), self._copy(far_reader, writer, True))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                if heard and len(piece) > LEAST_BYTES:
                    self.heard.append(time.perf_counter())
                writer.write(piece)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[Process, str, float]]:
    """A server; its process, its URL, and the seconds until it announced that."""
    started = time.perf_counter()
    running = await asyncio.create_subprocess_exec(sys.executable, "-m", *arguments, "--port", "0", stdout=PIPE)
    assert running.stdout is not None
    try:
        url = (await running.stdout.readline()).decode().split()[-1]
        yield running, url, time.perf_counter() - started
    finally:
        running.terminate()
        await running.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process by its own clock (see clock_getcpuclockid(3)): ticks miss what is done between them."""
    return time.clock_gettime((~pid << 3) | 2)


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


async def measure(verifier: str, policy: str, table: Table) -> None:
    relay = Relay(int(verifier.rsplit(":", 1)[1]))
    between = await asyncio.start_server(relay.connected, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{between.sockets[0].getsockname()[1]}"
    options = ("serve", "--verifier", address, "--policy", policy)
    async with process("edge_runtime.cli", *options) as (board, url, ready), httpx.AsyncClient() as client:
        late = []
        for seed in range(ANSWERS):
            body = {"prompt": PROMPT, "max_tokens": 24, "stream": True, "ignore_eos": True, "seed": seed}
            # The last session is closed meanwhile; what the verifier says to that is no answer.
            await asyncio.sleep(0.05)
            relay.heard.clear()
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                late.append(time.perf_counter() - relay.heard[0])
                async for _ in lines:
                    pass
        memory = resident(board.pid)
        before = cpu_seconds(board.pid)
        await asyncio.sleep(IDLE_SECONDS)
        idle = (cpu_seconds(board.pid) - before) / IDLE_SECONDS
    # Only now: closing the listener waits for the board's connections.
    between.close()
    # The first opened the connection.
    late = sorted(late[1:])
    table.add_row(f"ready, {policy}", f"{ready:.2f} s", "under 3 s")
    first = f"{1e3 * statistics.median(late):.1f} ms, {1e3 * late[len(late) * 19 // 20]:.1f} ms in 19 of 20"
    table.add_row(f"first event behind the verifier's first bytes, {policy}", first, "within 30 ms")
    table.add_row(f"memory, {policy}", f"{memory / 1e6:.0f} MB", "under 150 MB")
    table.add_row(f"idle CPU, {policy}", f"{100 * idle:.2f} % of a core", "under 1 %")


async def main() -> None:
    table = Table("what", "measured", "asked for", title=f"the local service, {os.cpu_count()} cores")
    options = ("serve", str(FAMILY / "target-v1"), "--threads", "1")
    async with process("cloud_verifier.cli", *options) as (_, url, _):
        for policy in ("analytic", "fixed"):
            await measure(url, policy, table)
    Console(width=120).print(table)


if __name__ == "__main__":
    asyncio.run(main())
