"""One verifier under a fleet: `python -m tests.benchmarks.fleet [--boards 200] [--seconds 60] [--promotions 10]`.

Starts a real verifier with a registry of three versions of the shipped family, and simulated boards that use it over
HTTP/2. Most rounds are regular, with correct and incorrect drafts of any length. Some boards disconnect in mid-round
and retry, send a round twice at once, read slowly, abandon their session, or send nonsense. Meanwhile `latest` is
promoted repeatedly. The guarantees: every text is its version's own, every error is typed, and memory does not grow
after the first ten seconds. Exit code 1 if one is broken.
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
from tests.toy_family import FAMILY, VOCABULARY_SIZE

VERSIONS = ("target-v1", "target-v2", "target-v3")
PROMPTS = ("import os\n", "class Stack:\n    def ", "for index in ", "#include <", "x = [")
SAMPLINGS = (
    Sampling(ignore_eos=True),
    Sampling(0.7, seed=1, ignore_eos=True),
    Sampling(1.0, top_p=0.9, seed=2, ignore_eos=True),
)
# Tokens per text; chosen.
LENGTH = 32
WARM_UP_SECONDS = 10.0
# Allowed growth of the verifier's resident memory after the warm-up; chosen.
MAX_GROWTH_BYTES = 24 << 20
# Errors that a well-behaved board may receive from a busy verifier; any other error breaks a guarantee.
EXPECTED_ERRORS = {ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED, ErrorCode.SESSION_LOST, ErrorCode.STARTING}
NONSENSE = (b"", b"\xff" * 40, b"{", b"[" * 5000, bytes(range(256)) * 40, b"\x95\x01\x00\x04\xc4\x02\x07\x08\x01")


class Job(NamedTuple):
    """A prompt with its sampling, and the correct text of each version by name."""

    prompt: list[int]
    sampling: Sampling
    expected: dict[str, list[int]]


class Fleet:
    """Runs all boards and collects their results.

    Attributes:
        counts: number of events by name.
        broken: descriptions of broken guarantees.
        overheads: round latencies without their forwards and prefill, in seconds.
        versions: number of finished texts by version.
    """

    def __init__(self, url: str, jobs: Sequence[Job]) -> None:
        self._url = url
        self._jobs = jobs
        self.counts: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.broken: list[str] = []
        self.overheads: list[float] = []

    async def run_board(self, seed: int, until: float) -> None:
        """Run one board: generate text after text, several per connection."""
        random = Random(seed)
        while time.monotonic() < until:
            async with httpx.AsyncClient(http1=False, http2=True, base_url=self._url, timeout=60) as client:
                try:
                    for _ in range(random.randint(1, 5)):
                        if time.monotonic() < until:
                            await self._generate_text(client, random)
                except ValueError as error:
                    # httpcore miscounts the streams of a connection if its first request is cancelled.
                    if "semaphore" not in str(error):
                        raise
                except (httpx.TransportError, InputError) as error:
                    self.broken.append(f"a well-behaved board lost its connection: {error!r}")
            self.counts["connections"] += 1

    async def _generate_text(self, client: httpx.AsyncClient, random: Random) -> None:
        job = random.choice(self._jobs)
        known, version = list(job.prompt), ""
        generated: list[int] = []
        key, number, path = f"{random.getrandbits(48):012x}", 0, ""
        while len(generated) < LENGTH:
            # A session that is opened again continues with the version that its text began with.
            expected = next((job.expected[name] for name in job.expected if version.startswith(f"{name}@")), [])
            draft = [
                token if random.random() < 0.75 else random.randrange(VOCABULARY_SIZE)
                for token in expected[len(generated) : len(generated) + random.choice([0, 1, 4, 5, 5, 8, 16])]
            ]
            siblings = {
                index: [expected[len(generated) + index]] for index in range(len(draft)) if random.random() < 0.2
            }
            round_request = RoundRequest(
                messages.PROTOCOL_VERSION,
                number,
                len(known),
                draft=draft,
                n=random.choice([1, 1, 1, 4, 16]),
                siblings=siblings,
                stream=random.random() < 0.2,
            )
            if path:
                message: Any = round_request
            else:
                message = OpenRequest(
                    messages.PROTOCOL_VERSION, key, list(known), round_request, job.sampling, model=version
                )
            await self._misbehave(client, path, message, random)
            started = time.monotonic()
            answer = await self._exchange(client, path or "/v1/sessions", message, random)
            if isinstance(answer, ErrorReply):
                self.counts[f"refused: {answer.code}"] += 1
                if answer.code not in EXPECTED_ERRORS:
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
            if not round_request.stream:
                self.overheads.append(time.monotonic() - started - 1e-4 * (frame.forward_100us + frame.prefill_100us))
            new = draft[: frame.accepted] + frame.tokens
            generated += new
            known += new
            number += 1
            self.counts["rounds"] += 1
            expected = job.expected[version.partition("@")[0]]
            if generated != expected[: len(generated)]:
                self.broken.append(f"{version}: {generated} instead of {expected[: len(generated)]}")
                return
            if random.random() < 0.02:
                # Leave without closing the session; the verifier must evict it.
                self.counts["left"] += 1
                return
            if random.random() < 0.3:
                await asyncio.sleep(random.random() * 0.2)
        self.counts["texts"] += 1
        self.versions[version.partition("@")[0]] += 1
        if random.random() < 0.8:
            await client.delete(path.removesuffix("/rounds"))

    async def _misbehave(self, client: httpx.AsyncClient, path: str, message: Any, random: Random) -> None:
        """Occasionally misbehave before a round is sent correctly."""
        url_path, draw = path or "/v1/sessions", random.random()
        body = messages.encode(message, MSGPACK, session_from_path(path))
        if draw < 0.03:
            self.counts["nonsense"] += 1
            response = await client.post(url_path, content=random.choice(NONSENSE))
            self._check_typed(response)
        elif draw < 0.06:
            self.counts["sent twice"] += 1
            first, second = await asyncio.gather(
                client.post(url_path, content=body), client.post(url_path, content=body), return_exceptions=False
            )
            self._check_typed(first)
            self._check_typed(second)
        elif draw < 0.09:
            self.counts["vanished in mid-round"] += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.random() * 0.03):
                    await client.post(url_path, content=body)
        elif draw < 0.10:
            self.counts["vanished with the connection"] += 1
            async with httpx.AsyncClient(http1=False, http2=True, base_url=self._url) as other:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.random() * 0.05):
                        await other.post(url_path, content=body)

    def _check_typed(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        error = decode_error(response)
        if error is None or (response.status_code >= 500 and error.code not in EXPECTED_ERRORS):
            self.broken.append(f"{response.status_code}: {response.content[:100]!r}")

    async def _exchange(
        self, client: httpx.AsyncClient, path: str, message: Any, random: Random
    ) -> tuple[OpenReply | None, Frame] | ErrorReply:
        """Send a round and return its reply; a streamed reply is read slowly."""
        session = session_from_path(path)
        async with client.stream("POST", path, content=messages.encode(message, MSGPACK, session)) as response:
            if response.status_code != 200:
                await response.aread()
                self._check_typed(response)
                error = decode_error(response)
                return error or ErrorReply(messages.PROTOCOL_VERSION, "untyped", "")
            if response.headers["content-type"] == MSGPACK:
                reply_body = await response.aread()
                if session:
                    return None, messages.decode(reply_body, Frame, MSGPACK, session)
                reply = messages.decode(reply_body, OpenReply, MSGPACK, session)
                return reply, reply.first
            frames: list[Frame] = []
            opened: OpenReply | None = None
            async for body in read_slowly(response, random):
                if frames or session:
                    frames.append(messages.decode(body, Frame, MSGPACK, session or (opened.session if opened else "")))
                else:
                    opened = messages.decode(body, OpenReply, MSGPACK)
                    frames.append(opened.first)
            tokens = [token for frame in frames for token in frame.tokens]
            return opened, msgspec.structs.replace(frames[-1], accepted=frames[0].accepted, tokens=tokens)


async def read_slowly(response: httpx.Response, random: Random) -> AsyncIterator[bytes]:
    splitter = FrameSplitter(MSGPACK)
    async for piece in response.aiter_raw():
        for body in splitter.feed(piece):
            yield body
        if random.random() < 0.3:
            await asyncio.sleep(random.random() * 0.5)


def session_from_path(path: str) -> str:
    return path.split("/")[3] if path.endswith("/rounds") else ""


def decode_error(response: httpx.Response) -> ErrorReply | None:
    with contextlib.suppress(InputError):
        return messages.decode(response.content, ErrorReply, response.headers.get("content-type", ""))
    return None


def make_jobs() -> list[Job]:
    """Make a job of every prompt and sampling; `cloud-verifier generate` writes the texts of each version."""
    tokenizer = Tokenizer.from_file(str(FAMILY / VERSIONS[0] / "tokenizer.json"))
    requests = [(tokenizer.encode(prompt).ids, sampling) for prompt in PROMPTS for sampling in SAMPLINGS]
    lines = [
        msgspec.json.encode({"ids": ids, "max_new_tokens": LENGTH + 36, "sampling": sampling}).decode()
        for ids, sampling in requests
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
        for index, (ids, sampling) in enumerate(requests)
    ]


@contextlib.contextmanager
def make_registry() -> Any:
    """Create a registry of the three versions, with `latest` at the first."""
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            run_targets_command(folder, "add", str(FAMILY / version))
        run_targets_command(folder, "promote", VERSIONS[0], "--alias", "latest", check=False)
        yield folder


def run_targets_command(folder: str, *words: str, check: bool = True) -> None:
    command = [sys.executable, "-m", "cloud_verifier.cli", "targets", words[0], "--registry", folder, *words[1:]]
    subprocess.run(command, check=check, capture_output=True)


async def run(boards: int, seconds: float, promotions: int, console: Console) -> int:
    with make_registry() as folder:
        command = [sys.executable, "-m", "cloud_verifier.cli", "serve", "--registry", folder, "--port", "0"]
        # A tight session limit: abandoned sessions are evicted soon, which bounds the memory of all sessions.
        command += ["--threads", "2", "--max-sessions", str(boards + 8), "--max-queue-seconds", "20"]
        verifier = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert verifier.stdout is not None
        try:
            url = (await verifier.stdout.readline()).decode().split()[-1]
            jobs = await asyncio.to_thread(make_jobs)
            await wait_all_loaded(url)
            fleet, process = Fleet(url, jobs), psutil.Process(verifier.pid)
            memory: list[tuple[float, int]] = []
            started = time.monotonic()

            async def watch() -> None:
                while True:
                    memory.append((time.monotonic() - started, process.memory_info().rss))
                    await asyncio.sleep(1)

            async def promote() -> None:
                for number in range(promotions):
                    await asyncio.sleep(seconds / (promotions + 1))
                    await asyncio.to_thread(run_targets_command, folder, "promote", VERSIONS[(number + 1) % 3])
                    fleet.counts["promotions"] += 1

            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task("running boards", total=seconds)

                async def advance() -> None:
                    while True:
                        progress.update(bar, completed=time.monotonic() - started)
                        await asyncio.sleep(0.5)

                background = [asyncio.create_task(work()) for work in (watch, promote, advance)]
                until = started + seconds
                await asyncio.gather(*(fleet.run_board(seed, until) for seed in range(boards)))
                for task in background:
                    task.cancel()
            verifier.terminate()
            if await asyncio.wait_for(verifier.wait(), 60) != 0:
                fleet.broken.append(f"the verifier ended with {verifier.returncode}")
        finally:
            if verifier.returncode is None:
                verifier.kill()
    return report(fleet, memory, boards, seconds, console)


async def wait_all_loaded(url: str) -> None:
    """Wait until every version can be requested."""
    async with httpx.AsyncClient(base_url=url) as client:
        while True:
            listed = (await client.get("/v1/models")).json()
            versions = {model["version"].partition("@")[0] for model in listed.get("data", [])}
            if versions >= set(VERSIONS):
                return
            await asyncio.sleep(0.2)


def report(fleet: Fleet, memory: list[tuple[float, int]], boards: int, seconds: float, console: Console) -> int:
    before = max((size for at, size in memory if at <= WARM_UP_SECONDS), default=0)
    after = float(np.median([size for _, size in memory[-5:]]))
    if after - before > MAX_GROWTH_BYTES:
        fleet.broken.append(
            f"the verifier grew by {(after - before) / 2**20:.0f} MB after the first {WARM_UP_SECONDS:g} s"
        )
    if not fleet.counts["texts"]:
        fleet.broken.append("no text was finished")
    table = Table(title=f"{boards} boards for {seconds:g} s, target-v1 to -v3 on a CPU")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for name, count in sorted(fleet.counts.items()):
        table.add_row(name, str(count))
    for version, count in sorted(fleet.versions.items()):
        table.add_row(f"texts of {version}", str(count))
    tokens = fleet.counts["texts"] * LENGTH / seconds
    table.add_row("tokens of finished texts per second", f"{tokens:.0f}")
    for percentile in (50, 95, 99):
        milliseconds = 1e3 * float(np.percentile(fleet.overheads or [0.0], percentile))
        table.add_row(f"round latency without forwards, {percentile} %, ms", f"{milliseconds:.0f}")
    samples = [f"{size / 2**20:.0f}" for at, size in memory[:: max(1, int(WARM_UP_SECONDS))]]
    table.add_row("memory every 10 s, MB", " ".join([*samples, f"{after / 2**20:.0f}"]))
    console.print(table)
    for sentence in dict.fromkeys(fleet.broken[:20]):
        console.print(f"broken: {sentence}", style="red", markup=False)
    console.print("all guarantees held" if not fleet.broken else f"{len(fleet.broken)} broken")
    return 1 if fleet.broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=200, help="number of boards (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration (default: %(default)g)")
    parser.add_argument("--promotions", type=int, default=10, help="promotions of `latest` (default: %(default)s)")
    options = parser.parse_args()
    return asyncio.run(run(options.boards, options.seconds, options.promotions, Console(width=110)))


if __name__ == "__main__":
    raise SystemExit(main())
