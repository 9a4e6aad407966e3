"""Talks HTTP to a verifier: connections that are kept, and attempts that are repeated until a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
import tenacity

from edge_runtime.contract import wire
from edge_runtime.contract.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.contract.wire import ErrorCode, Message
from edge_runtime.probes.tcp import ByteMeter

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# Seconds for one attempt: to connect, and between two pieces of an answer.
CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
# A session whose board vanished is evicted anyway, so closing one politely is worth little waiting.
CLOSE_SECONDS = 2.0
# Refusals that another attempt may better. After `internal` the session is lost, and a repeated round finds that out.
PASSING_CODES = {ErrorCode.OVERLOADED, ErrorCode.STARTING, ErrorCode.INTERNAL}


class BrokenAnswer(Exception):
    """The answer ended in mid-message, or is not what a verifier says: another attempt may be better."""


class VerifierClient:
    """Connections to one verifier, for any number of sessions at once. Use as an async context manager.

    Attributes:
        url: base URL.
        deadline: seconds within which a round must succeed, all attempts together.
        meter: bytes of all connections.
        retries: attempts that repeated another.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline: float = 30.0,
        http2: bool = True,
        token: str = "",
        authorities: Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            http2: use HTTP/2 where the verifier offers it.
            token: shown to the verifier, or to what stands in front of it, as bearer token; empty shows none.
            authorities: PEM file of those to trust for TLS, instead of the system's.
            transport: instead of the network, for tests.

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
        self.deadline = deadline
        self.meter = ByteMeter()
        self.retries = 0
        # Without TLS nobody negotiates the version of HTTP: it is guessed until the first answer.
        self._guessing = http2 and parsed.scheme == "http" and transport is None
        self._clear_http2 = self._guessing
        self._token = token
        self._trust: ssl.SSLContext | bool = True
        if authorities is not None:
            try:
                self._trust = ssl.create_default_context(cafile=authorities)
            except OSError as error:
                raise InputError(f"cannot trust the authorities in {authorities}: {error}") from None
        self._http = self._connections(transport, http1=not self._guessing, http2=http2)
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> VerifierClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Waits for sessions that are being closed, and closes the connections."""
        await asyncio.gather(*self._closing)
        await self._http.aclose()

    async def models(self) -> wire.ModelList:
        """What the verifier serves. Raises VerifierError."""

        async def fetch() -> wire.ModelList:
            async with self.exchange("GET", "/v1/models", None) as response:
                return parsed(await response.aread(), wire.ModelList)

        return await self.persist(fetch, time.monotonic() + self.deadline)

    async def persist(self, attempt: Callable[[], Awaitable[T]], until: float) -> T:
        """Calls `attempt`, with growing, jittered pauses, until it works or `until` (`time.monotonic`) has passed.

        Raises:
            VerifierRefused: for a reason that repeating does not better, or that lasted until the end.
            VerifierUnreachable: no usable answer until then.
        """
        try:
            async for trial in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(_may_pass),
                wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
                stop=tenacity.stop_after_delay(max(0.0, until - time.monotonic())),
                reraise=True,
            ):
                with trial:
                    self.retries += trial.retry_state.attempt_number > 1
                    async with asyncio.timeout(max(0.001, until - time.monotonic())):
                        return await attempt()
        except (httpx.TransportError, TimeoutError, BrokenAnswer) as error:
            cause = str(error) or type(error).__name__
            raise VerifierUnreachable(
                f"no usable answer from {self.url} within {self.deadline:g} s ({cause}); is it running, is the link up?"
            ) from error
        raise AssertionError("tenacity ends by returning or raising")

    @contextlib.asynccontextmanager
    async def exchange(self, method: str, path: str, message: Message | None) -> AsyncIterator[httpx.Response]:
        """One request, once; the answer's body is still to be read.

        Raises VerifierRefused for a refusal; httpx.TransportError and BrokenAnswer for `persist` to judge.
        """
        response = await self._send(method, path, None if message is None else wire.encode(message, wire.MSGPACK))
        try:
            if not response.is_success:
                raise _refused(response, await response.aread())
            yield response
        finally:
            await response.aclose()

    def close_session(self, session_id: str) -> None:
        """Closes a session in the background; whether that works is of no consequence."""

        async def close() -> None:
            with contextlib.suppress(httpx.HTTPError, VerifierRefused, BrokenAnswer, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS), self.exchange("DELETE", f"/v1/sessions/{session_id}", None):
                    pass

        self.in_background(close())

    def in_background(self, work: Coroutine[None, None, None]) -> None:
        """Runs `work`, which raises nothing and is brief, beside everything else; `aclose` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _send(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        request = self._http.build_request(
            method,
            self.url + path,
            content=content,
            headers=None if content else {"accept": wire.MSGPACK},
            extensions={"trace": self.meter.trace},
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
        self._guessing = False
        return response

    def _connections(
        self, transport: httpx.AsyncBaseTransport | None, *, http1: bool, http2: bool
    ) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(verify=self._trust, http1=http1, http2=http2),
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        )
        # Every byte counts on a metered link, and nobody reads these.
        for name in ("accept", "accept-encoding", "connection", "user-agent"):
            del client.headers[name]
        if self._token:
            client.headers["authorization"] = f"Bearer {self._token}"
        return client


def parsed(body: bytes, kind: type[M]) -> M:
    """A message of the verifier. Raises BrokenAnswer if it is none."""
    try:
        message = wire.decode(body, kind, wire.MSGPACK)
    except InputError as error:
        raise BrokenAnswer(str(error)) from None
    return message


def _refused(response: httpx.Response, body: bytes) -> Exception:
    try:
        refusal = wire.decode(body, wire.Refusal, wire.MSGPACK)
    except InputError:
        message = f"{response.url} answered {response.status_code}, and not as a verifier does"
        if response.status_code >= 500:
            return BrokenAnswer(message)
        hint = f"{message}; is this URL a verifier's, or is a captive portal in between?"
        return VerifierRefused(ErrorCode.UNKNOWN_ROUTE, hint, response.status_code)
    return VerifierRefused(refusal.code, refusal.message, response.status_code, refusal.detail)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, VerifierRefused):
        return error.code in PASSING_CODES
    return isinstance(error, (httpx.TransportError, BrokenAnswer))
