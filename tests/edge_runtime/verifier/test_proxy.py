"""A proxy is used if it is configured, and proxies of the environment never are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import InputError, VerifierUnreachable
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import Fault
from edge_runtime.verifier.session import VerifierSession
from tests.conftest import serving
from tests.edge_runtime.verifier.test_client import PROMPT, expected, text_of
from tests.edge_runtime.verifier.test_link_faults import DAYS, certificate

ODD_VALUES = ["nonsense", "socks5://127.0.0.1:1", "http://127.0.0.1:1", "://", "http://[::1"]
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@contextlib.asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """An HTTP proxy; yields its URL, and the first line of every request as it comes."""
    lines: list[str] = []

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                sink.write(piece)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.partition(b"\r\n")
        lines.append(line.decode())
        method, target, _ = line.decode().split(" ")
        place, _, path = target.removeprefix("http://").partition("/")
        host, port = place.split(":")
        upstream, onward = await asyncio.open_connection(host, int(port))
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            # One request per connection keeps this short.
            rest = rest.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
            onward.write(f"{method} /{path} HTTP/1.1\r\n".encode() + rest)
        await asyncio.gather(copy(reader, onward), copy(upstream, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lines


async def test_plain_http_goes_through_the_proxy(tiny: Target) -> None:
    async with serving(tiny) as server, proxy() as (url, lines), VerifierClient(server.url, proxy=url) as client:
        assert (await client.models()).data
        assert lines == [f"GET {server.url}/v1/models HTTP/1.1"]


@pytest.mark.slow
async def test_tls_is_tunnelled_by_the_proxy(tiny: Target, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path, DAYS[-5], DAYS[5])
    async with serving(tiny, certificate=pem, key=key) as server, proxy() as (url, lines):
        async with VerifierClient(server.url, authorities=pem, proxy=url) as client:
            session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True))
            assert await text_of(session, 4) == await expected(tiny, 4)
            assert client.meter.rtt_seconds is not None
            session.close()
        assert lines == [f"CONNECT {server.url.removeprefix('https://')} HTTP/1.1"]


async def test_a_proxy_that_does_not_answer_is_a_fault_of_the_link() -> None:
    async with VerifierClient("https://verifier.example", proxy="http://127.0.0.1:1", deadline=0.3) as client:
        with pytest.raises(VerifierUnreachable) as caught:
            await client.models()
    assert caught.value.fault == Fault.REFUSED


@pytest.mark.parametrize("value", ["nonsense", "socks5://x:1", "http://", "http://a/path", "http://[::1"])
def test_what_is_no_proxy_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="is not the URL of an HTTP proxy"):
        VerifierClient("http://127.0.0.1:1", proxy=value)


@pytest.mark.parametrize("value", ODD_VALUES)
async def test_the_environment_is_ignored(tiny: Target, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, value)
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        assert (await client.models()).data
