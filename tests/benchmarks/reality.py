"""Planner policies on a real verifier: `python -m tests.benchmarks.reality`. Three minutes.

Runs the real decoding loop against a real verifier process with the example target, through a relay that delays every
byte by half a round-trip time. Each policy generates the same texts, with a new planner for each link. The policies
take turns, so that noise of the machine affects all of them. Prints milliseconds per token; the first text, in which a
policy learns, is listed separately.
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
from tests.benchmarks.speed import FAMILY, run_verifier
from tests.emulator.answer_checker import PROMPTS

TOKENS = 96


@contextlib.asynccontextmanager
async def run_relay(port: int, delay: float) -> AsyncIterator[str]:
    """Relay connections to `port` on this machine with `delay` seconds each way; yields the relay's URL."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

        async def deliver() -> None:
            while True:
                due, chunk = await queue.get()
                await asyncio.sleep(due - loop.time())
                writer.write(chunk)

        delivering = asyncio.create_task(deliver())
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                queue.put_nowait((loop.time() + delay, chunk))
        await asyncio.sleep(delay)
        delivering.cancel()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        verifier_reader, verifier_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(copy(reader, verifier_writer), copy(verifier_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def make_planners(draft: OnnxDraft, policies: list[str]) -> dict[str, Planner]:
    step_seconds, prefill_seconds = draft.measure_speed()
    device = DeviceModel(step_seconds=step_seconds, prefill_seconds=prefill_seconds, overhead_seconds=0.0)
    acceptance = draft.manifest.acceptance
    baselines: dict[str, Planner] = {
        "streaming": FixedPlanner(Plan(0, continuation=1 << 12)),
        "K=5, 2 siblings": FixedPlanner(Plan(5, siblings=2)),
    }
    return baselines | {name: make_planner(name, Objective(), device, acceptance=acceptance) for name in policies}


async def measure(
    url: str, draft: OnnxDraft, policies: list[str], temperature: float
) -> dict[str, tuple[float, float, float]]:
    """Return by policy: (ms per token after the first text, ms per token of the first text, draft tokens per token)."""
    times: dict[str, list[float]] = {}
    drafted: dict[str, list[float]] = {}
    async with VerifierClient(url) as client:
        planners = make_planners(draft, policies)
        for index, prompt in enumerate(PROMPTS):
            ids = draft.tokenizer.encode(prompt).ids
            for name, planner in planners.items():
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


async def compare(url: str, options: argparse.Namespace, draft: OnnxDraft, title: str) -> Table:
    table = Table("ms per token (first text) drafted/token", title=title)
    links = [0.0, 0.02, 0.06]
    columns = []
    for temperature in (0.0, 0.7):
        for rtt in links:
            table.add_column(f"T={temperature:g}\n{1e3 * rtt:.0f} ms", justify="right")
            async with run_relay(int(url.rsplit(":", 1)[1]), rtt / 2) as relay_url:
                columns.append(await measure(relay_url, draft, options.policies, temperature))
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
    for title, verifier_options in (
        ("a plain verifier", ()),
        ("a verifier that speculates", ("--draft", str(FAMILY / "bundle"), "--draft-threads", "1")),
    ):
        with run_verifier(FAMILY / "target-v1", "--threads", "1", *verifier_options) as url:
            console.print(asyncio.run(compare(url, options, draft, title)))


if __name__ == "__main__":
    main()
