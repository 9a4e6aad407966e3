"""Planning on real ground: `python -m tests.benchmarks.reality`.

The board's real loop, a real verifier process with the example target, and a relay between them that holds every
byte back for half a round-trip time. Each policy writes the same texts, with a new planner for each link; the policies
take turns, so that a noisy machine is noisy for all. Milliseconds per token, the first text apart: that is where a
policy learns. Three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.table import Table

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.factory import POLICY_NAMES, make_planner
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import FixedPlanner, Plan, Planner
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.benchmarks.speed import FAMILY, verifier
from tests.emulator.answer_checker import PROMPTS

TOKENS = 96


@contextlib.asynccontextmanager
async def relay(port: int, delay: float) -> AsyncIterator[str]:
    """A way to `port` on this machine that takes `delay` seconds each way; its URL."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

        async def deliver() -> None:
            while True:
                due, piece = await queue.get()
                await asyncio.sleep(due - loop.time())
                writer.write(piece)

        delivering = asyncio.create_task(deliver())
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                queue.put_nowait((loop.time() + delay, piece))
        await asyncio.sleep(delay)
        delivering.cancel()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(carry(reader, back), carry(there, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def planners(draft: OnnxDraft, policies: list[str]) -> dict[str, Planner]:
    step, read = draft.measure_speed()
    device = DeviceModel(step_seconds=step, prefill_seconds=read, overhead_seconds=0.0)
    acceptance = draft.manifest.acceptance
    some: dict[str, Planner] = {
        "streaming": FixedPlanner(Plan(0, own=1 << 12)),
        "K=5, 2 siblings": FixedPlanner(Plan(5, siblings=2)),
    }
    return some | {name: make_planner(name, Objective(), device, acceptance=acceptance) for name in policies}


async def measure(
    url: str, draft: OnnxDraft, policies: list[str], temperature: float
) -> dict[str, tuple[float, float, float]]:
    """(ms per token after the first text, of the first text, share of rounds that drafted) by policy."""
    times: dict[str, list[float]] = {}
    drafted: dict[str, list[float]] = {}
    async with VerifierClient(url) as client:
        made = planners(draft, policies)
        for index, prompt in enumerate(PROMPTS):
            ids = draft.tokenizer.encode(prompt).ids
            for name, planner in made.items():
                sampling = Sampling(temperature, seed=index, ignore_eos=True)
                generation = Generation(draft, client, ids, sampling, max_new_tokens=TOKENS, planner=planner)
                started = time.perf_counter()
                async for _ in generation:
                    pass
                times.setdefault(name, []).append(1e3 * (time.perf_counter() - started) / TOKENS)
                drafted.setdefault(name, []).append(generation.statistics.drafted / TOKENS)
    return {
        name: (statistics.mean(times[name][1:]), times[name][0], statistics.mean(drafted[name][1:])) for name in times
    }


async def compare(url: str, options: argparse.Namespace, draft: OnnxDraft, speculates: str) -> Table:
    table = Table("ms per token (first text) drafted/token", title=speculates)
    links = [0.0, 0.02, 0.06]
    columns = []
    for temperature in (0.0, 0.7):
        for rtt in links:
            table.add_column(f"T={temperature:g}\n{1e3 * rtt:.0f} ms", justify="right")
            async with relay(int(url.rsplit(":", 1)[1]), rtt / 2) as way:
                columns.append(await measure(way, draft, options.policies, temperature))
    for name in columns[0]:
        cells = [f"{column[name][0]:.1f} ({column[name][1]:.1f}) {column[name][2]:.1f}" for column in columns]
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=POLICY_NAMES, default=["analytic"])
    options = parser.parse_args()
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    console = Console(width=130)
    for title, more in (
        ("a plain verifier", ()),
        ("a verifier that speculates", ("--draft", str(FAMILY / "bundle"), "--draft-threads", "1")),
    ):
        with verifier(FAMILY / "target-v1", "--threads", "1", *more) as url:
            console.print(asyncio.run(compare(url, options, draft, title)))


if __name__ == "__main__":
    main()
