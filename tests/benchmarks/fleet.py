"""A verifier and a fleet: `python -m tests.benchmarks.fleet [--boards 200] [--seconds 60] [--promotions 10]`.

A real verifier of a registry with three versions of the shipped family, in a process of its own, and boards that talk
to it over HTTP/2: most as they should, with drafts of any length, right and wrong; some vanish in mid-round and ask
again, send a round twice at once, read slowly, leave, or send nonsense. Meanwhile `latest` is promoted again and again.
Promised, whatever happens: every text is its version's own, every refusal is typed, and memory does not grow behind the
first ten seconds. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.messages import (
    MSGPACK,
    ErrorCode,
    ErrorReply,
    Frame,
    FrameSplitter,
    OpenReply,
    OpenRequest,
    RoundRequest,
)
from edge_runtime.protocol.sampling import Sampling

FAMILY = Path(__file__).resolve().parents[2] / "export" / "example_family"
VERSIONS = ("target-v1", "target-v2", "target-v3")
PROMPTS = ("import os\n", "class Stack:\n    def ", "for index in ", "#include <", "x = [")
SAMPLINGS = (
    Sampling(ignore_eos=True),
    Sampling(0.7, seed=1, ignore_eos=True),
    Sampling(1.0, top_p=0.9, seed=2, ignore_eos=True),
)
LENGTH = 32
WARMING = 10.0
GROWTH = 24 << 20
# What a board may be told that does as it should, on a verifier that has much to do; anything else is its own fault.
FAIR = {ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED, ErrorCode.SESSION_LOST, ErrorCode.STARTING}
NONSENSE = (b"", b"\xff" * 40, b"{", b"[" * 5000, bytes(range(256)) * 40, b"\x95\x01\x00\x04\xc4\x02\x07\x08\x01")


class Job(NamedTuple):
    """What to ask, and what each version answers, by its name."""

    prompt: list[int]
    sampling: Sampling
    truth: dict[str, list[int]]


class Fleet:
    """All boards together.

    Attributes:
        counts: what happened, by its name.
        broken: promises that were not kept, in words.
        beside: seconds of rounds that were neither a forward nor reading a prompt.
        versions: texts that were finished, by version.
    """

    def __init__(self, url: str, jobs: Sequence[Job]) -> None:
        self._url = url
        self._jobs = jobs
        self.counts: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.broken: list[str] = []
        self.beside: list[float] = []

    async def board(self, seed: int, until: float) -> None:
        """One board's life: text after text, over one connection while it lasts."""
        random = Random(seed)
        while time.monotonic() < until:
            async with httpx.AsyncClient(http1=False, http2=True, base_url=self._url, timeout=60) as client:
                try:
                    for _ in range(random.randint(1, 5)):
                        if time.monotonic() < until:
                            await self._text(client, random)
                except ValueError as error:
                    # httpcore loses count of a connection's streams when its first request is cancelled.
                    if "semaphore" not in str(error):
                        raise
                except (httpx.TransportError, InputError) as error:
                    self.broken.append(f"a board that was left alone lost its connection: {error!r}")
            self.counts["connections"] += 1

    async def _text(self, client: httpx.AsyncClient, random: Random) -> None:
        job = random.choice(self._jobs)
        known, said, version = list(job.prompt), [], ""
        key, number, path = f"{random.getrandbits(48):012x}", 0, ""
        while len(said) < LENGTH:
            # A session that is opened again goes on with the version that its text began with.
            truth = next((job.truth[name] for name in job.truth if version.startswith(f"{name}@")), [])
            draft = [
                token if random.random() < 0.75 else random.randrange(8192)
                for token in truth[len(said) : len(said) + random.choice([0, 1, 4, 5, 5, 8, 16])]
            ]
            siblings = {index: [truth[len(said) + index]] for index in range(len(draft)) if random.random() < 0.2}
            asked = RoundRequest(
                messages.PROTOCOL_VERSION,
                number,
                len(known),
                draft=draft,
                n=random.choice([1, 1, 1, 4, 16]),
                siblings=siblings,
                stream=random.random() < 0.2,
            )
            if path:
                message: Any = asked
            else:
                message = OpenRequest(messages.PROTOCOL_VERSION, key, list(known), asked, job.sampling, model=version)
            await self._misbehave(client, path, message, random)
            started = time.monotonic()
            answer = await self._say(client, path or "/v1/sessions", message, random)
            if isinstance(answer, ErrorReply):
                self.counts[f"refused: {answer.code}"] += 1
                if answer.code not in FAIR:
                    self.broken.append(f"refused: {answer.code}: {answer.message}")
                    return
                if answer.code == ErrorCode.SESSION_LOST:
                    key, number, path = f"{random.getrandbits(48):012x}", 0, ""
                else:
                    await asyncio.sleep(random.random())
                continue
            opened, frame = answer
            if opened is not None:
                path = f"/v1/sessions/{opened.session}/rounds"
                version = opened.version
            if not asked.stream:
                self.beside.append(time.monotonic() - started - 1e-4 * (frame.forward_100us + frame.prefill_100us))
            new = draft[: frame.accepted] + frame.tokens
            said += new
            known += new
            number += 1
            self.counts["rounds"] += 1
            truth = job.truth[version.partition("@")[0]]
            if said != truth[: len(said)]:
                self.broken.append(f"{version}: {said} instead of {truth[: len(said)]}")
                return
            if random.random() < 0.02:
                # Gone without a word; the verifier finds out by itself.
                self.counts["left"] += 1
                return
            if random.random() < 0.3:
                await asyncio.sleep(random.random() * 0.2)
        self.counts["texts"] += 1
        self.versions[version.partition("@")[0]] += 1
        if random.random() < 0.8:
            await client.delete(path.removesuffix("/rounds"))

    async def _misbehave(self, client: httpx.AsyncClient, path: str, message: Any, random: Random) -> None:
        """Now and then, before a round is played as it should be."""
        where, dice = path or "/v1/sessions", random.random()
        body = messages.encode(message, MSGPACK, session_of(path))
        if dice < 0.03:
            self.counts["nonsense"] += 1
            response = await client.post(where, content=random.choice(NONSENSE))
            self._must_be_typed(response)
        elif dice < 0.06:
            self.counts["sent twice"] += 1
            first, second = await asyncio.gather(
                client.post(where, content=body), client.post(where, content=body), return_exceptions=False
            )
            self._must_be_typed(first)
            self._must_be_typed(second)
        elif dice < 0.09:
            self.counts["vanished in mid-round"] += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.random() * 0.03):
                    await client.post(where, content=body)
        elif dice < 0.10:
            self.counts["vanished with the connection"] += 1
            async with httpx.AsyncClient(http1=False, http2=True, base_url=self._url) as other:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.random() * 0.05):
                        await other.post(where, content=body)

    def _must_be_typed(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        refusal = refusal_of(response)
        if refusal is None or (response.status_code >= 500 and refusal.code not in FAIR):
            self.broken.append(f"{response.status_code}: {response.content[:100]!r}")

    async def _say(
        self, client: httpx.AsyncClient, path: str, message: Any, random: Random
    ) -> tuple[OpenReply | None, Frame] | ErrorReply:
        """The answer to a round, read slowly where it is streamed."""
        session = session_of(path)
        kind = Frame if session else OpenReply
        async with client.stream("POST", path, content=messages.encode(message, MSGPACK, session)) as response:
            if response.status_code != 200:
                await response.aread()
                self._must_be_typed(response)
                refusal = refusal_of(response)
                return refusal or ErrorReply(messages.PROTOCOL_VERSION, "untyped", "")
            if response.headers["content-type"] == MSGPACK:
                one = messages.decode(await response.aread(), kind, MSGPACK, session)
                return (None, one) if isinstance(one, Frame) else (one, one.first)
            frames: list[Frame] = []
            opened: OpenReply | None = None
            async for body in slowly(response, random):
                if frames or session:
                    frames.append(messages.decode(body, Frame, MSGPACK, session or (opened.session if opened else "")))
                else:
                    opened = messages.decode(body, OpenReply, MSGPACK)
                    frames.append(opened.first)
            tokens = [token for frame in frames for token in frame.tokens]
            return opened, msgspec.structs.replace(frames[-1], accepted=frames[0].accepted, tokens=tokens)


async def slowly(response: httpx.Response, random: Random) -> AsyncIterator[bytes]:
    splitter = FrameSplitter(MSGPACK)
    async for piece in response.aiter_raw():
        for body in splitter.feed(piece):
            yield body
        if random.random() < 0.3:
            await asyncio.sleep(random.random() * 0.5)


def session_of(path: str) -> str:
    return path.split("/")[3] if path.endswith("/rounds") else ""


def refusal_of(response: httpx.Response) -> ErrorReply | None:
    with contextlib.suppress(InputError):
        return messages.decode(response.content, ErrorReply, response.headers.get("content-type", ""))
    return None


def jobs() -> list[Job]:
    """Every prompt under every sampling; the texts by `cloud-verifier generate`, version by version."""
    tokenizer = Tokenizer.from_file(str(FAMILY / VERSIONS[0] / "tokenizer.json"))
    asked = [(tokenizer.encode(prompt).ids, sampling) for prompt in PROMPTS for sampling in SAMPLINGS]
    lines = [
        msgspec.json.encode({"ids": ids, "max_new_tokens": LENGTH + 36, "sampling": sampling}).decode()
        for ids, sampling in asked
    ]
    texts: dict[str, list[list[int]]] = {}
    for version in VERSIONS:
        command = [sys.executable, "-m", "cloud_verifier.cli", "generate", str(FAMILY / version), "--jobs", "-"]
        output = subprocess.run(
            [*command, "--threads", "1"], input="\n".join(lines), check=True, capture_output=True, text=True
        ).stdout
        texts[version] = [json.loads(line) for line in output.splitlines()]
    return [
        Job(ids, sampling, {version: texts[version][index] for version in VERSIONS})
        for index, (ids, sampling) in enumerate(asked)
    ]


@contextlib.contextmanager
def registry() -> Any:
    """A registry of the three versions, the first of them in use."""
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            targets(folder, "add", str(FAMILY / version))
        targets(folder, "promote", VERSIONS[0], "--alias", "latest", check=False)
        yield folder


def targets(folder: str, *words: str, check: bool = True) -> None:
    command = [sys.executable, "-m", "cloud_verifier.cli", "targets", words[0], "--registry", folder, *words[1:]]
    subprocess.run(command, check=check, capture_output=True)


async def run(boards: int, seconds: float, promotions: int, console: Console) -> int:
    with registry() as folder:
        command = [sys.executable, "-m", "cloud_verifier.cli", "serve", "--registry", folder, "--port", "0"]
        # Those who left without a word are evicted soon: what the sessions hold is bounded by how many there may be.
        command += ["--threads", "2", "--max-sessions", str(boards + 8), "--max-queue-seconds", "20"]
        verifier = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert verifier.stdout is not None
        try:
            url = (await verifier.stdout.readline()).decode().split()[-1]
            known = await asyncio.to_thread(jobs)
            await all_loaded(url)
            fleet, process = Fleet(url, known), psutil.Process(verifier.pid)
            memory: list[tuple[float, int]] = []
            started = time.monotonic()

            async def watch() -> None:
                while True:
                    memory.append((time.monotonic() - started, process.memory_info().rss))
                    await asyncio.sleep(1)

            async def promote() -> None:
                for number in range(promotions):
                    await asyncio.sleep(seconds / (promotions + 1))
                    await asyncio.to_thread(targets, folder, "promote", VERSIONS[(number + 1) % 3])
                    fleet.counts["promotions"] += 1

            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task("boards at work", total=seconds)

                async def advance() -> None:
                    while True:
                        progress.update(bar, completed=time.monotonic() - started)
                        await asyncio.sleep(0.5)

                others = [asyncio.create_task(work()) for work in (watch, promote, advance)]
                until = started + seconds
                await asyncio.gather(*(fleet.board(seed, until) for seed in range(boards)))
                for other in others:
                    other.cancel()
            verifier.terminate()
            if await asyncio.wait_for(verifier.wait(), 60) != 0:
                fleet.broken.append(f"the verifier ended with {verifier.returncode}")
        finally:
            if verifier.returncode is None:
                verifier.kill()
    return verdict(fleet, memory, boards, seconds, console)


async def all_loaded(url: str) -> None:
    """Returns when every version can be asked for."""
    async with httpx.AsyncClient(base_url=url) as client:
        while True:
            listed = (await client.get("/v1/models")).json()
            versions = {model["version"].partition("@")[0] for model in listed.get("data", [])}
            if versions >= set(VERSIONS):
                return
            await asyncio.sleep(0.2)


def verdict(fleet: Fleet, memory: list[tuple[float, int]], boards: int, seconds: float, console: Console) -> int:
    before = max((size for at, size in memory if at <= WARMING), default=0)
    after = float(np.median([size for _, size in memory[-5:]]))
    if after - before > GROWTH:
        fleet.broken.append(f"the verifier grew by {(after - before) / 2**20:.0f} MB behind the first {WARMING:g} s")
    if not fleet.counts["texts"]:
        fleet.broken.append("not one text was finished")
    table = Table(title=f"{boards} boards for {seconds:g} s, target-v1 to -v3 on a CPU")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for name, count in sorted(fleet.counts.items()):
        table.add_row(name, str(count))
    for version, count in sorted(fleet.versions.items()):
        table.add_row(f"texts of {version}", str(count))
    tokens = fleet.counts["texts"] * LENGTH / seconds
    table.add_row("tokens of finished texts per second", f"{tokens:.0f}")
    for share in (50, 95, 99):
        spent = 1e3 * float(np.percentile(fleet.beside or [0.0], share))
        table.add_row(f"round less its forwards, {share} %, ms", f"{spent:.0f}")
    every = [f"{size / 2**20:.0f}" for at, size in memory[:: max(1, int(WARMING))]]
    table.add_row("memory every 10 s, MB", " ".join([*every, f"{after / 2**20:.0f}"]))
    console.print(table)
    for sentence in dict.fromkeys(fleet.broken[:20]):
        console.print(f"broken: {sentence}", style="red", markup=False)
    console.print("all promises kept" if not fleet.broken else f"{len(fleet.broken)} broken")
    return 1 if fleet.broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)g")
    parser.add_argument("--promotions", type=int, default=10, help="default: %(default)s")
    options = parser.parse_args()
    return asyncio.run(run(options.boards, options.seconds, options.promotions, Console(width=110)))


if __name__ == "__main__":
    raise SystemExit(main())
