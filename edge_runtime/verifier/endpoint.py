"""One verifier as seen from here: the connections to it, and whether it was well when last heard of."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import H2Error
from hpack.exceptions import HPACKError
from hyperframe.exceptions import HyperframeError

from edge_runtime.probes.tcp import ByteMeter
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Message
from edge_runtime.verifier.link_faults import (
    FIRM,
    Fault,
    LinkFailure,
    failure_of,
    look_at_alert,
    look_closer,
    portal_of,
)

# Seconds for one attempt: to connect, between two pieces of an answer, and for the peer's kernel to acknowledge: a peer
# that is slow acknowledges, one that is gone does not.
CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
ACKNOWLEDGE_SECONDS = 5.0
# While an answer is waited for, the kernel asks after so many seconds of silence, and so many later again: on a
# connection that a NAT has forgotten, nothing else would tell.
SILENT_SECONDS, ASKING_SECONDS = 5, 2
# Failures in a row after which others are tried, and seconds after which this one may be tried again.
FEW = 2
REST_SECONDS = 30.0
# What the libraries below httpx let through when a connection breaks at a bad moment, or when bytes of it were changed.
LEAKS = (H2Error, HPACKError, HyperframeError, ssl.SSLError, anyio.BrokenResourceError, anyio.ClosedResourceError)
# Refusals that say that the verifier itself is unwell.
UNWELL = {ErrorCode.OVERLOADED, ErrorCode.STARTING, ErrorCode.INTERNAL, ErrorCode.DRAINING}
# Longest pause that a verifier may ask for, in seconds; more is taken for this.
LONGEST_WAIT = 3600

# h2 normalises headers so that HPACK never remembers a token, which then costs its whole length in every round: 33
# bytes of 93. What that is to prevent is guessing at a secret by how well it compresses beside a header that somebody
# else chooses: nobody else chooses any here, and tokens are random. Ours need no other normalising.
LEAN = H2Configuration(validate_inbound_headers=False, normalize_outbound_headers=False)

# h2 remembers the last 65536 streams of a connection, with a hundred bytes each, to tell late frames from nonsense. On
# a board those are hours of answers, and 8 MB; frames here are late by a few streams.
H2Connection.MAX_CLOSED_STREAMS = 1024


class Endpoint:
    """Connections to one base URL.

    Attributes:
        url: base URL, without a slash at its end.
        trouble: the last failure, until something works again.
        failed_at: when that was, by `time.monotonic`.
    """

    def __init__(
        self,
        url: str,
        meter: ByteMeter,
        *,
        http2: bool = True,
        token: str = "",
        trust: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            meter: counts the bytes of the connections.
            http2, token, transport: see `VerifierClient`.
            trust: whose certificates.

        Raises:
            InputError: `url` is not an http or https URL.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InputError(f"{url!r} is not a URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"{url!r} is not the URL of a verifier; write for instance http://127.0.0.1:8500")
        self.url = url.rstrip("/")
        self.trouble: LinkFailure | None = None
        self.failed_at = 0.0
        self._failures = 0
        self._secure = parsed.scheme == "https"
        self._host, self._port = parsed.host, parsed.port or 443
        self._answered = False
        self._looked: tuple[float, Fault | None] = (-REST_SECONDS, None)
        self._meter = meter
        self._token = token
        self._trust = trust
        # Without TLS nobody negotiates the version of HTTP: it is guessed until the first answer.
        self._guessing = http2 and parsed.scheme == "http" and transport is None
        self._clear_http2 = self._guessing
        self._http = self._connections(transport, http1=not self._guessing, http2=http2)

    @property
    def well(self) -> bool:
        """Whether it is worth trying before others."""
        return self._failures < FEW or time.monotonic() - self.failed_at > REST_SECONDS

    def show(self, token: str) -> None:
        """From now on shows another token, or with an empty one none."""
        self._token = token
        self._http.headers.pop("authorization", None)
        if token:
            self._http.headers["authorization"] = f"Bearer {token}"

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def exchange(
        self, method: str, path: str, message: Message | None, session: str = ""
    ) -> AsyncIterator[httpx.Response]:
        """One request, once; the answer's body is still to be read. For `session` see `wire.encode`.

        Raises VerifierRefused for a refusal, and LinkFailure.
        """
        try:
            content = None if message is None else messages.encode(message, messages.MSGPACK, session)
            response = await self._send(method, path, content)
            try:
                portal = portal_of(response)
                if portal:
                    raise portal
                if not response.is_success:
                    raise _refused(response, await response.aread())
                yield response
            finally:
                await response.aclose()
        except (httpx.RequestError, *LEAKS) as error:
            raise self._note(await self._told_apart(failure_of(error))) from error
        except LinkFailure as failure:
            raise self._note(failure) from failure.__cause__
        except VerifierRefused as refused:
            if refused.code in UNWELL:
                # One that is about to end is as good as gone: no second chance.
                self._note(LinkFailure(str(refused), Fault.UNAVAILABLE), firm=refused.code == ErrorCode.DRAINING)
            else:
                self._note_success()
            raise
        else:
            self._note_success()

    def _note(self, failure: LinkFailure, *, firm: bool = False) -> LinkFailure:
        self._failures += FEW if firm or failure.fault in FIRM else 1
        self.trouble, self.failed_at = failure, time.monotonic()
        return failure

    def _note_success(self) -> None:
        self._failures, self.trouble = 0, None

    async def _told_apart(self, failure: LinkFailure) -> LinkFailure:
        """`failure`, or what is behind it where a certificate was not accepted: the other's, or ours."""
        ours = failure.fault == Fault.BROKEN and not self._answered
        if not self._secure or not (ours or failure.fault == Fault.TLS):
            return failure
        if time.monotonic() - self._looked[0] >= REST_SECONDS:
            look = look_at_alert(self._host, self._port, self._trust) if ours else look_closer(self._host)
            self._looked = (time.monotonic(), await look)
        return LinkFailure(str(failure), self._looked[1] or failure.fault)

    async def _send(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        request = self._http.build_request(
            method,
            self.url + path,
            content=content,
            headers=None if content else {"accept": messages.MSGPACK},
            extensions={"trace": self._trace},
        )
        try:
            response = await self._http.send(request, stream=True)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            if self._guessing:
                # Somebody is there and does not understand us: the next attempt speaks the other version.
                self._clear_http2 = not self._clear_http2
                await self._http.aclose()
                self._http = self._connections(None, http1=not self._clear_http2, http2=self._clear_http2)
            raise
        except ValueError as error:
            # Where the very first request of a connection was cancelled, httpcore has lost count of its streams.
            if "semaphore" not in str(error):
                raise
            raise httpx.LocalProtocolError(str(error), request=request) from error
        self._guessing, self._answered = False, True
        return response

    async def _trace(self, event: str, info: dict[str, Any]) -> None:
        """What httpcore tells of a request."""
        await self._meter.trace(event, info)
        if event == "http2.send_connection_init.complete" and self._pool is not None:
            # Nothing of httpx's or httpcore's leads here. Without it tokens are dearer, and that is all.
            for connection in self._pool.connections:
                state = getattr(getattr(connection, "_connection", None), "_h2_state", None)
                if state is not None:
                    state.config = LEAN

    def _connections(
        self, transport: httpx.AsyncBaseTransport | None, *, http1: bool, http2: bool
    ) -> httpx.AsyncClient:
        patience = [
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * ACKNOWLEDGE_SECONDS)),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASKING_SECONDS),
        ]
        transport = transport or httpx.AsyncHTTPTransport(
            verify=self._trust, http1=http1, http2=http2, socket_options=patience
        )
        self._pool = getattr(transport, "_pool", None)
        client = httpx.AsyncClient(
            transport=transport,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        )
        # Every byte counts on a metered link, and nobody reads these.
        for name in ("accept", "accept-encoding", "connection", "user-agent"):
            del client.headers[name]
        if self._token:
            client.headers["authorization"] = f"Bearer {self._token}"
        return client


def _refused(response: httpx.Response, body: bytes) -> Exception:
    try:
        refusal = messages.decode(body, messages.Refusal, messages.MSGPACK)
    except InputError:
        message = f"{response.url} answered {response.status_code}, and not as a verifier does"
        if response.status_code >= 500 or response.status_code == 429:
            return LinkFailure(message, Fault.UNAVAILABLE)
        hint = f"{message}; is this URL a verifier's?"
        return VerifierRefused(ErrorCode.UNKNOWN_ROUTE, hint, response.status_code)
    return VerifierRefused(
        refusal.code, refusal.message, response.status_code, refusal.detail, _seconds(response.headers)
    )


def _seconds(headers: httpx.Headers) -> int | None:
    """What Retry-After says, where it is a number; a date would be that of a clock which may differ from ours."""
    said = headers.get("retry-after", "")
    return min(int(said), LONGEST_WAIT) if said.isascii() and said.isdigit() and len(said) < 10 else None
