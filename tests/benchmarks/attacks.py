"""The attacks of the siege, each in a process of its own: `python -m tests.benchmarks.attacks NAME SCENE`.

SCENE is the JSON of a `Scene`. An attack runs until its time is over and prints a JSON list of the guarantees that it
saw broken. It comes from another address of loopback than the honest client, as a stranger would, and at a low
priority, since the work of a stranger's machine must not be measured as work of the attacked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import httpx
import msgspec

from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import ErrorReply, OpenReply, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.hostile_archives import attack_installation
from tests.benchmarks.service import peak_resident_bytes, run_server
from tests.emulator.test_bed import BUNDLE, ProcessUsage

# What a stranger's connections come from. All of 127.0.0.0/8 is loopback on Linux.
ATTACKER_ADDRESS = "127.0.0.66"
# The connection preface of HTTP/2 and an empty SETTINGS frame (RFC 9113, sections 3.4 and 6.5).
IDLE_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
IDLE_CONNECTIONS = 500
LARGE_PROMPTS = 200
SLOW_CONNECTIONS = 50
# Both ends cut a body off after 30 s; a slow machine may take a while longer.
SLOW_BODY_SECONDS = 45.0
ENDLESS_CONNECTIONS = 8
# Far above the limits of both ends (256 KiB and 1 MiB), with what sockets hold.
MAX_ENDLESS_BYTES = 64 << 20
TOKEN_FLOOD_WORKERS = 16
# Between two rounds of the session that must survive: a board on a bad link.
TENANT_PAUSE_SECONDS = 2.0
CHEAP_CONNECTIONS, CHEAP_STREAMS = 20, 20
# What a board's memory may grow by while a captive portal answers; chosen: answers are capped at a mebibyte.
MAX_PORTAL_GROWTH_BYTES = 64 << 20
PORTAL_ANSWER_BYTES = 1 << 30
FORGED_LINE = "forged: everything is fine"


class Scene(msgspec.Struct, frozen=True):
    """What there is to attack.

    Attributes:
        board, verifier: base URLs.
        flood_token: token of a principal without limits.
        tenant_token: token of another principal, whose session must survive.
        log_files: logs of both processes.
        seconds: duration of the attack.
    """

    board: str
    verifier: str
    flood_token: str
    tenant_token: str
    log_files: list[str]
    seconds: float


Attack = Callable[[Scene], Awaitable[list[str]]]
M = TypeVar("M", bound=messages.Message)
P = ParamSpec("P")


def _client(base_url: str, *, token: str = "", http2: bool = False) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(
        local_address=ATTACKER_ADDRESS,
        http1=not http2,
        http2=http2,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0 if not http2 else None),
    )
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(base_url=base_url, transport=transport, headers=headers, timeout=30.0)


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), local_addr=(ATTACKER_ADDRESS, 0))


async def _repeat(
    scene: Scene,
    workers: int,
    pause: float,
    action: Callable[P, Awaitable[None]],
    *arguments: P.args,
    **named: P.kwargs,
) -> None:
    """Run `action` again and again with several workers until the time is over; broken connections are expected."""

    async def work() -> None:
        while True:
            with contextlib.suppress(httpx.TransportError, OSError):
                await action(*arguments, **named)
            await asyncio.sleep(pause)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(scene.seconds):
            await asyncio.gather(*(work() for _ in range(workers)))


async def hold_idle_connections(scene: Scene) -> list[str]:
    """1,000 idle HTTP/2 connections, opened again when they are closed."""

    async def hold(url: str) -> None:
        reader, writer = await _connect(url)
        try:
            writer.write(IDLE_HTTP2)
            while await reader.read(4096):
                pass
        finally:
            writer.close()

    await asyncio.gather(*(_repeat(scene, IDLE_CONNECTIONS, 1.0, hold, url) for url in (scene.board, scene.verifier)))
    return []


async def flood_prompts(scene: Scene) -> list[str]:
    """200 prompts of 200 KB at once, again and again."""
    untyped: set[str] = set()
    body = msgspec.json.encode({"prompt": "def read(path): " * 12_500, "max_tokens": 16})
    async with _client(scene.board) as client:

        async def send() -> None:
            response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            if response.status_code not in (400, 413, 429, 503):
                untyped.add(f"a prompt longer than the context was answered {response.status_code}")

        await _repeat(scene, LARGE_PROMPTS, 0.5, send)
    return sorted(untyped)


async def answer_oversized(scene: Scene) -> list[str]:
    """A captive portal in place of a board's verifier, which answers with bombs and without end."""
    broken: list[str] = []
    listener = await asyncio.start_server(CaptivePortal().handle_connection, "127.0.0.1", 0)
    portal = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    options: tuple[str, ...] = ("serve", "--bundle", str(BUNDLE), "--threads", "1", "--verifier", portal, "--no-http2")
    options += ("--deadline", "5", "--log-level", "error")
    async with run_server("edge_runtime.cli", *options) as (board, url, _), httpx.AsyncClient(base_url=url) as client:
        before = ProcessUsage.from_pid(board.pid).resident

        async def ask() -> None:
            body = {"prompt": "def main():", "max_tokens": 8}
            response = await client.post("/v1/completions", json=body, timeout=60.0)
            if response.status_code == 200 or not response.json()["error"]["message"]:
                broken.append(f"the answer of a captive portal was passed on: {response.text[:80]}")

        async def check_health() -> None:
            started = time.monotonic()
            response = await client.get("/healthz", timeout=60.0)
            if response.status_code != 200 or time.monotonic() - started > 5.0:
                broken.append(f"/healthz of a board with a captive portal took {time.monotonic() - started:.1f} s")

        await asyncio.gather(_repeat(scene, 2, 0.0, ask), _repeat(scene, 1, 0.5, check_health))
        grown = peak_resident_bytes(board.pid) - before
    listener.close()
    if grown > MAX_PORTAL_GROWTH_BYTES:
        broken.append(f"answers of a captive portal took a board {grown >> 20} MB of memory")
    return broken[:5]


class CaptivePortal:
    """Answers every request of HTTP/1.1 with 200 and far more than was asked for, in one of several ways by turns."""

    def __init__(self) -> None:
        # The fastest level, and once: compressing takes longer than anything else here.
        compressor, zeros = zlib.compressobj(1, zlib.DEFLATED, 31), bytes(1 << 20)
        pieces = [compressor.compress(zeros) for _ in range(PORTAL_ANSWER_BYTES >> 20)]
        self._compressed = b"".join(pieces) + compressor.flush()
        self._turns = itertools.cycle((self._bomb, self._endless_body, self._huge_frame, self._endless_header))

    async def handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await reader.readuntil(b"\r\n\r\n")
            if length := re.search(rb"content-length: (\d+)", head.lower()):
                await reader.readexactly(int(length[1]))
            for piece in next(self._turns)():
                writer.write(piece)
                await writer.drain()
        writer.close()

    def _bomb(self) -> Iterator[bytes]:
        """A gibibyte of zeros in a few megabytes of gzip."""
        yield self._head(f"content-encoding: gzip\r\ncontent-length: {len(self._compressed)}\r\n") + self._compressed

    def _endless_body(self) -> Iterator[bytes]:
        yield self._head("transfer-encoding: chunked\r\n")
        for _ in range(PORTAL_ANSWER_BYTES >> 16):
            yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"

    def _huge_frame(self) -> Iterator[bytes]:
        """A message whose length prefix, a varint, says 2^32 - 1."""
        yield self._head("transfer-encoding: chunked\r\n") + b"5\r\n\xff\xff\xff\xff\x0f\r\n"
        for _ in range(PORTAL_ANSWER_BYTES >> 16):
            yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"

    def _endless_header(self) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-type: application/msgpack\r\nx-long: "
        for _ in range(PORTAL_ANSWER_BYTES >> 16):
            yield b"x" * (1 << 16)

    @staticmethod
    def _head(headers: str) -> bytes:
        return f"HTTP/1.1 200 OK\r\ncontent-type: application/msgpack\r\n{headers}\r\n".encode()


async def install_archives(scene: Scene) -> list[str]:
    """Hostile archives for `edge-runtime bundle install`."""
    return await asyncio.to_thread(attack_installation, scene.seconds)


async def send_slowly(scene: Scene) -> list[str]:
    """Bodies of a byte a second. A connection that is still read after the limit breaks a guarantee."""
    survivors: dict[str, int] = {}

    async def trickle(url: str, path: str, media_type: str) -> None:
        reader, writer = await _connect(url)
        closed = asyncio.create_task(reader.read(1))
        started = time.monotonic()
        try:
            writer.write(_post_head(path, media_type, scene.flood_token, "content-length: 1000"))
            while not closed.done():
                writer.write(b"{")
                await asyncio.wait({closed}, timeout=1.0)
                if time.monotonic() - started > SLOW_BODY_SECONDS:
                    survivors[url] = survivors.get(url, 0) + 1
                    return
        finally:
            closed.cancel()
            writer.close()

    await asyncio.gather(
        *(
            _repeat(scene, SLOW_CONNECTIONS, 1.0, trickle, *at)
            for at in (
                (scene.board, "/v1/completions", messages.JSON),
                (scene.verifier, "/v1/sessions", messages.JSON),
            )
        )
    )
    return [
        f"{count} bodies of a byte a second were read for {SLOW_BODY_SECONDS:g} s by {url}"
        for url, count in survivors.items()
    ]


async def send_endless_bodies(scene: Scene) -> list[str]:
    """Chunked bodies without an end, as fast as they are taken."""
    largest: dict[str, int] = {}
    chunk = b"4000\r\n" + b" " * (1 << 14) + b"\r\n"

    async def pour(url: str, path: str) -> None:
        reader, writer = await _connect(url)
        answered = asyncio.create_task(reader.read(1))
        sent = 0
        try:
            writer.write(_post_head(path, messages.JSON, scene.flood_token, "transfer-encoding: chunked"))
            while not answered.done() and sent < MAX_ENDLESS_BYTES:
                writer.write(chunk)
                sent += len(chunk)
                async with asyncio.timeout(30.0):
                    await writer.drain()
                await asyncio.sleep(0)
        finally:
            largest[url] = max(largest.get(url, 0), sent)
            answered.cancel()
            writer.close()

    await asyncio.gather(
        *(
            _repeat(scene, ENDLESS_CONNECTIONS, 0.5, pour, *at)
            for at in ((scene.board, "/v1/completions"), (scene.verifier, "/v1/sessions"))
        )
    )
    return [
        f"{url} took {sent >> 20} MB of a body without an end"
        for url, sent in largest.items()
        if sent >= MAX_ENDLESS_BYTES
    ]


def _post_head(path: str, media_type: str, token: str, framing: str) -> bytes:
    headers = f"host: localhost\r\ncontent-type: {media_type}\r\nauthorization: Bearer {token}\r\n{framing}\r\n\r\n"
    return f"POST {path} HTTP/1.1\r\n{headers}".encode()


async def flood_with_sessions(scene: Scene) -> list[str]:
    """A token without limits that opens sessions and closes none, while another one keeps its only session."""
    broken: list[str] = []
    numbers = itertools.count()

    async with (
        _client(scene.verifier, token=scene.flood_token, http2=True) as flood,
        _client(scene.verifier, token=scene.tenant_token, http2=True) as tenant,
    ):

        async def open_one() -> None:
            await _open_session(flood, [3 + next(numbers) % 1000] * 400)

        await asyncio.gather(
            _repeat(scene, TOKEN_FLOOD_WORKERS, 0.0, open_one), _keep_session(tenant, scene.seconds, broken)
        )
    return broken


async def _open_session(client: httpx.AsyncClient, prompt: list[int], n: int = 1) -> OpenReply | ErrorReply:
    first = RoundRequest(messages.PROTOCOL_VERSION, 0, len(prompt), n=n)
    request = OpenRequest(
        v=messages.PROTOCOL_VERSION,
        key=os.urandom(12).hex(),
        prompt=prompt,
        sampling=Sampling(ignore_eos=True),
        first=first,
    )
    return await _exchange(client, "/v1/sessions", request, OpenReply)


async def _exchange(
    client: httpx.AsyncClient, path: str, request: messages.Message, kind: type[M], session: str = ""
) -> M | ErrorReply:
    content = messages.encode(request, messages.MSGPACK, session)
    response = await client.post(path, content=content, headers={"content-type": messages.MSGPACK})
    if response.status_code != 200:
        return messages.decode(response.content, ErrorReply, messages.MSGPACK)
    return messages.decode(response.content, kind, messages.MSGPACK, session)


async def _keep_session(client: httpx.AsyncClient, seconds: float, broken: list[str]) -> None:
    """Open one session and run a round of it now and then: it must stay, and be served."""
    end = time.monotonic() + seconds
    opened = await _open_session(client, [5, 6, 7, 8])
    if isinstance(opened, ErrorReply):
        broken.append(f"another token's session was refused: {opened.code}")
        return
    position, number = 4 + len(opened.first.tokens), 0
    while time.monotonic() < end - 2 * TENANT_PAUSE_SECONDS:
        await asyncio.sleep(TENANT_PAUSE_SECONDS)
        request = RoundRequest(messages.PROTOCOL_VERSION, number + 1, position)
        path = f"/v1/sessions/{opened.session}/rounds"
        reply = await _exchange(client, path, request, messages.Frame, opened.session)
        if isinstance(reply, ErrorReply):
            broken.append(f"another token's round was refused: {reply.code}")
            if reply.code == messages.ErrorCode.SESSION_LOST:
                return
        else:
            position, number = position + len(reply.tokens), number + 1


async def forge_log_lines(scene: Scene) -> list[str]:
    """Escape sequences and line breaks in everything that a log may repeat."""
    odd_headers = [(b"x-request-id", b"\x9b31mforged"), (b"user-agent", b"odd \x9b31m")]
    sent = 0
    forged = f"%1b%5b31m%0d%0a{FORGED_LINE.replace(' ', '%20')}%0a"
    async with _client(scene.board) as board, _client(scene.verifier, token=scene.flood_token) as verifier:

        async def send() -> None:
            nonlocal sent
            for client in (board, verifier):
                for method, path in (
                    ("POST", f"/v1/sessions/{forged}/rounds"),
                    ("DELETE", f"/v1/sessions/{forged}"),
                    ("GET", f"/v1/models/{forged}"),
                    ("GET", f"/{forged}?{forged}"),
                ):
                    await client.request(method, path, headers=odd_headers)
                body = {"prompt": "x", "model": f"\x1b[31m\r\n{FORGED_LINE}\n", "max_tokens": 1}
                await client.post("/v1/completions", json=body)
                sent += 1

        await _repeat(scene, 1, 0.2, send)
    if not sent:
        return ["no forged request was answered"]
    return [sentence for path in scene.log_files for sentence in find_forgeries(Path(path))]


def find_forgeries(log_file: Path) -> list[str]:
    """Describe what a stranger wrote into a log: control characters, and lines of its own."""
    content = log_file.read_bytes()
    broken = []
    if re.search(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", content):
        broken.append(f"{log_file.name} has control characters")
    if any(line.startswith(FORGED_LINE.encode()) for line in content.splitlines()):
        broken.append(f"{log_file.name} has a forged line")
    return broken


async def ask_for_documents(scene: Scene) -> list[str]:
    """20 connections of 20 streams that ask for the OpenAPI documents."""

    async def ask(client: httpx.AsyncClient) -> None:
        await client.get("/openapi.json")

    async with contextlib.AsyncExitStack() as stack:
        tasks = []
        for url in (scene.board, scene.verifier):
            for _ in range(CHEAP_CONNECTIONS // 2):
                client = await stack.enter_async_context(_client(url, http2=True))
                tasks.append(_repeat(scene, CHEAP_STREAMS, 0.0, ask, client))
        await asyncio.gather(*tasks)
    return []


ATTACKS: dict[str, Attack] = {
    "idle": hold_idle_connections,
    "prompts": flood_prompts,
    "answers": answer_oversized,
    "archives": install_archives,
    "slow": send_slowly,
    "endless": send_endless_bodies,
    "tokens": flood_with_sessions,
    "logs": forge_log_lines,
    "documents": ask_for_documents,
}


def main() -> int:
    os.nice(10)
    broken = asyncio.run(_run(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Scene)))
    print(msgspec.json.encode(broken).decode())
    return 0


async def _run(name: str, scene: Scene) -> list[str]:
    return await ATTACKS[name](scene)


if __name__ == "__main__":
    raise SystemExit(main())
