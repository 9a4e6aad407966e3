"""Every fault that can keep a board from its verifier, with real sockets: the diagnosis and the failover."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused, VerifierUnreachable
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier import link_faults
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import Fault
from edge_runtime.verifier.session import VerifierSession
from tests.conftest import serving
from tests.edge_runtime.verifier.test_client import PROMPT, expected, text_of

PAGE = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 5\r\n\r\nLogin"
ELSEWHERE = b"HTTP/1.1 302 Found\r\nlocation: http://login.example/\r\ncontent-length: 0\r\n\r\n"


@contextlib.asynccontextmanager
async def answering(answer: bytes | None, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that sends `answer` to every request, or nothing if None; yields `host:port`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if answer is None:
                await reader.read()
            writer.write(answer or b"")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def fault_at(url: str, deadline: float = 2.0, authorities: Path | None = None) -> tuple[str, str]:
    """Code and message of the fault of the verifier at `url`."""
    async with VerifierClient(url, deadline=deadline, authorities=authorities) as client:
        with pytest.raises(VerifierUnreachable) as caught:
            await client.models()
        assert caught.value.fault == (client.trouble.fault if client.trouble else Fault.TIMED_OUT)
    return caught.value.fault, str(caught.value)


@pytest.mark.slow
async def test_a_name_that_does_not_exist() -> None:
    fault, sentence = await fault_at("http://verifier.invalid", 3.0)
    assert fault == Fault.DNS
    assert "is the name right?" in sentence


@pytest.mark.slow
async def test_a_closed_port() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        fault, sentence = await fault_at(f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert fault == Fault.REFUSED
    assert "nothing listens on that port" in sentence


@pytest.mark.slow
async def test_a_silent_peer() -> None:
    async with answering(None) as place:
        fault, _ = await fault_at(f"http://{place}")
    assert fault == Fault.TIMED_OUT


@pytest.mark.slow
async def test_a_truncated_answer() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc") as place:
        fault, _ = await fault_at(f"http://{place}")
    assert fault == Fault.BROKEN


@pytest.mark.slow
@pytest.mark.parametrize("answer", [PAGE, ELSEWHERE, PAGE.replace(b"200 OK", b"511 Network Authentication Required")])
async def test_a_captive_portal(answer: bytes) -> None:
    async with answering(answer) as place:
        fault, sentence = await fault_at(f"http://{place}")
    assert fault == Fault.PORTAL
    assert "log in" in sentence


@pytest.mark.slow
async def test_a_proxy_without_its_verifier() -> None:
    async with answering(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n") as place:
        fault, _ = await fault_at(f"http://{place}")
    assert fault == Fault.UNAVAILABLE


def certificate(folder: Path, first_day: datetime.datetime, last_day: datetime.datetime) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "verifier")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), first_day, last_day)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "certificate.pem", folder / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    secret.write_bytes(key.private_bytes(*encoding))
    return pem, secret


NOW = datetime.datetime.now(datetime.UTC)
DAYS = {day: NOW + datetime.timedelta(days=day) for day in (-9, -5, 5, 9)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("days", "trusted", "fault", "hint"),
    [
        ((-5, 5), True, "", ""),
        ((-5, 5), False, Fault.TLS, "--ca-file"),
        ((-9, -5), True, Fault.TLS, "certificate"),
        ((5, 9), True, Fault.CLOCK, "timedatectl"),
    ],
)
async def test_certificates(
    tiny: Target, tmp_path: Path, days: tuple[int, int], trusted: bool, fault: str, hint: str
) -> None:
    pem, key = certificate(tmp_path, DAYS[days[0]], DAYS[days[1]])
    async with serving(tiny, certificate=pem, key=key) as server:
        if not fault:
            async with VerifierClient(server.url, authorities=pem) as client:
                assert (await client.models()).data
            return
        found, sentence = await fault_at(server.url, 2.0, pem if trusted else None)
    assert found == fault
    assert hint in sentence


@pytest.mark.slow
async def test_diagnosis_of_an_untrusted_certificate(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain HTTP request reveals captive portals and wrong clocks."""
    pem, key = certificate(tmp_path, DAYS[-9], DAYS[-5])
    date = b"HTTP/1.1 404 Not Found\r\ndate: %b\r\ncontent-length: 0\r\n\r\n"
    now, then = (time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + off)) for off in (0, -86400))
    answers = {ELSEWHERE: Fault.PORTAL, date % then.encode(): Fault.CLOCK, date % now.encode(): Fault.TLS}
    async with serving(tiny, certificate=pem, key=key) as server:
        for answer, fault in answers.items():
            async with answering(answer) as place:
                monkeypatch.setattr(link_faults, "HTTP_PORT", int(place.rsplit(":", 1)[1]))
                assert (await fault_at(server.url, 2.0, pem))[0] == fault


async def test_an_impatient_session_reports_a_fault_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with VerifierClient(f"http://127.0.0.1:{bound.getsockname()[1]}", deadline=60.0) as client:
            with pytest.raises(VerifierUnreachable) as caught:
                await text_of(VerifierSession(client, PROMPT, Sampling(), patient=False), 1)
    assert caught.value.fault == Fault.REFUSED
    assert client.retries == 0


@pytest.mark.slow
async def test_a_connection_closed_while_idle_is_not_a_fault(tiny: Target) -> None:
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True), patient=False)
        await text_of(session, 3)
        for connection, _ in client.meter._sockets:
            connection._sock.shutdown(socket.SHUT_RDWR)
        assert await text_of(session, 3) == await expected(tiny)
        assert (session.recoveries, client.retries) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("patient", [True, False])
async def test_failover_to_another_verifier_mid_text(tiny: Target, patient: bool) -> None:
    wanted = await expected(tiny)
    async with serving(tiny) as second:
        async with serving(tiny) as first:
            client = VerifierClient([first.url, second.url])
            session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True), patient=patient)
            await text_of(session, 3)
            assert client.url == first.url
        async with client:
            assert await text_of(session, 3) == wanted
            assert session.recoveries == 1
            assert (client.url, client.trouble) == (second.url, None)
            # The next session does not try the first endpoint.
            retries = client.retries
            assert await text_of(VerifierSession(client, PROMPT, Sampling(ignore_eos=True))) == wanted
            assert client.retries == retries


@pytest.mark.slow
async def test_a_session_never_continues_on_another_target(tiny: Target, target_v1: Target) -> None:
    """A session is pinned to its version: verifiers without it are skipped, and the session waits for its own."""
    async with serving(target_v1) as other:
        async with serving(tiny) as own:
            port = int(own.url.rsplit(":", 1)[1])
            client = VerifierClient([own.url, other.url], deadline=20.0)
            session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True))
            await text_of(session, 3)
        async with client:
            going_on = asyncio.create_task(text_of(session, 3))
            await asyncio.sleep(0.5)
            assert not going_on.done()
            async with serving(tiny, port=port):
                assert await going_on == await expected(tiny)


async def test_a_model_that_no_verifier_serves_is_refused(tiny: Target) -> None:
    async with serving(tiny) as one, serving(tiny) as two, VerifierClient([one.url, two.url]) as client:
        with pytest.raises(VerifierRefused, match="unknown_model"):
            await text_of(VerifierSession(client, PROMPT, Sampling(), model="gpt"), 1)
