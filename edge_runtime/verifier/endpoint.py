"""One verifier: the HTTP exchange with it, the diagnosis of failures, and its health for endpoint selection."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from h2.exceptions import H2Error
from hpack.exceptions import HPACKError
from hyperframe.exceptions import HyperframeError

from edge_runtime.common.http_client import UNCOMPRESSED, UnusableAnswer, read_answer
from edge_runtime.common.network import check_proxy, is_http_url
from edge_runtime.probes import ByteMeter
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Message
from edge_runtime.verifier.http_transport import (
    CONNECT_SECONDS,
    READ_SECONDS,
    new_transport,
    trust_nobody,
    use_lean_headers,
)
from edge_runtime.verifier.link_faults import (
    HINTS,
    PERSISTENT,
    BrokenAnswer,
    Fault,
    LinkFailure,
    LinkProblem,
    failure_of,
    portal_of,
    probe_over_http,
    probe_tls_alert,
)

# Circuit breaker, both chosen: consecutive failures after which other endpoints are preferred, and seconds until this
# one is tried again.
MAX_FAILURES = 2
COOLDOWN_SECONDS = 30.0
# Exceptions of the libraries below httpx that escape it when a connection breaks mid-frame or its bytes were corrupted.
TRANSPORT_ERRORS = (
    H2Error,
    HPACKError,
    HyperframeError,
    ssl.SSLError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
)
# Refusals that concern the verifier itself rather than the request.
UNHEALTHY = {ErrorCode.OVERLOADED, ErrorCode.STARTING, ErrorCode.INTERNAL, ErrorCode.DRAINING}
# Refusals that every request of this board would get.
DENIALS = {
    *(ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN),
    *(ErrorCode.UNKNOWN_ROUTE, ErrorCode.UNSUPPORTED_VERSION),
}
# Characters that are kept of a refusal, which ends up in logs and in answers to clients. Chosen: more than verifiers
# write.
MAX_CODE_CHARACTERS, MAX_SENTENCE_CHARACTERS = 64, 2000
# Upper bound of an accepted Retry-After.
MAX_RETRY_AFTER_SECONDS = 3600


class Endpoint:
    """Connections to one base URL.

    Attributes:
        url: base URL without a trailing slash.
        trouble: the last failure; None after a success.
        failed_at: its time by `time.monotonic`.
        denial: why the verifier refuses whatever this board asks, such as an unknown token; None if it does not.
        failing_since: Unix time of the first failure or denial after the last success.
        answered_at: time of the last answer by `time.monotonic`; None before the first.
    """

    def __init__(
        self,
        url: str,
        meter: ByteMeter,
        *,
        http2: bool = True,
        token: str = "",
        trust: ssl.SSLContext | bool = True,
        proxy: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            meter: counts the bytes of the connections.
            http2, token, proxy, transport: see `VerifierClient`.
            trust: TLS context, or True for the default.

        Raises:
            InputError: `url` or `proxy` is not an http or https URL.
        """
        self._proxy = check_proxy(proxy) if proxy else ""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InputError(f"{url!r} is not a URL: {error}") from None
        if not is_http_url(url):
            raise InputError(f"{url!r} is not the URL of a verifier; write for instance http://127.0.0.1:8500")
        self.url = url.rstrip("/")
        self.trouble: LinkFailure | None = None
        self.failed_at = 0.0
        self.denial: VerifierRefused | None = None
        self.failing_since = 0.0
        self.answered_at: float | None = None
        self._failures = 0
        self._secure = parsed.scheme == "https"
        self._host, self._port = parsed.host, parsed.port or 443
        self._answered = False
        self._diagnosis: tuple[float, Fault | None] = (-COOLDOWN_SECONDS, None)
        self._meter = meter
        self._token = token
        if not self._secure:
            self._trust = trust_nobody()
        else:
            self._trust = trust if isinstance(trust, ssl.SSLContext) else httpx.create_ssl_context()
        # Without TLS there is no ALPN to negotiate the HTTP version: guess until the first answer.
        # Through a proxy, plain HTTP is HTTP/1.1.
        self._guessing = http2 and parsed.scheme == "http" and transport is None and not proxy
        self._clear_http2 = self._guessing
        self._http = self._connections(transport, http1=not self._guessing, http2=http2)

    @property
    def healthy(self) -> bool:
        """Whether to prefer this endpoint: few recent failures, or the cooldown is over."""
        return self._failures < MAX_FAILURES or time.monotonic() - self.failed_at > COOLDOWN_SECONDS

    @property
    def problem(self) -> LinkProblem | None:
        """Why no round can be verified here, as far as known; None while this works, or before the first attempt."""
        if self.denial is not None:
            text = str(self.denial).removesuffix(f" [{self.denial.code}]")
            return LinkProblem(self.denial.code, f"{self.url} refuses this board: {text}", self.failing_since)
        if self.trouble is None or (self._failures < MAX_FAILURES and self.answered_at is not None):
            return None
        fault = self.trouble.fault
        return LinkProblem(fault, f"{self.url}: {self.trouble}: {HINTS[fault]}", self.failing_since)

    def set_token(self, token: str) -> None:
        """Use another bearer token from now on; empty for none."""
        self._token = token
        self._http.headers.pop("authorization", None)
        if token:
            self._http.headers["authorization"] = f"Bearer {token}"

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def exchange(
        self, method: str, path: str, message: Message | None, session: str = ""
    ) -> AsyncIterator[httpx.Response]:
        """Send one request, without retries; the caller reads the response body by `common.http_client`.

        For `session` see `messages.encode`.

        Raises:
            VerifierRefused: the verifier answered with a typed error.
            LinkFailure: no usable answer.
        """
        try:
            if isinstance(message, messages.OpenRequest):
                # A prompt of 100,000 ids took milliseconds to prepare: let others use the event loop before it is
                # packed, which takes as long, and again before it is sent.
                await asyncio.sleep(0)
            content = None if message is None else messages.encode(message, messages.MSGPACK, session)
            if isinstance(message, messages.OpenRequest):
                await asyncio.sleep(0)
            response = await self._send(method, path, content)
            try:
                portal = portal_of(response)
                if portal:
                    raise portal
                if not response.is_success:
                    raise _error_from(response, await read_answer(response, messages.MAX_REPLY_BYTES))
                yield response
            finally:
                await response.aclose()
        except (httpx.RequestError, *TRANSPORT_ERRORS) as error:
            raise self._record_failure(await self._diagnose(failure_of(error))) from error
        except UnusableAnswer as error:
            raise self._record_failure(BrokenAnswer(str(error))) from None
        except LinkFailure as failure:
            raise self._record_failure(failure) from failure.__cause__
        except VerifierRefused as refused:
            if refused.code in UNHEALTHY:
                # A draining verifier is about to exit: prefer the others at once.
                self._record_failure(
                    LinkFailure(str(refused), Fault.UNAVAILABLE), persistent=refused.code == ErrorCode.DRAINING
                )
            else:
                self._record_answer(refused if refused.code in DENIALS else None)
            raise
        else:
            self._record_answer()

    def _record_failure(self, failure: LinkFailure, *, persistent: bool = False) -> LinkFailure:
        self._failures += MAX_FAILURES if persistent or failure.fault in PERSISTENT else 1
        if self.trouble is None and self.denial is None:
            self.failing_since = time.time()
        self.trouble, self.failed_at, self.denial = failure, time.monotonic(), None
        return failure

    def _record_answer(self, denial: VerifierRefused | None = None) -> None:
        if denial is not None and self.trouble is None and self.denial is None:
            self.failing_since = time.time()
        self._failures, self.trouble, self.denial, self.answered_at = 0, None, denial, time.monotonic()

    async def _diagnose(self, failure: LinkFailure) -> LinkFailure:
        """Refine `failure` if TLS may be the cause: a rejected certificate of either side, or a wrong clock."""
        our_certificate = failure.fault == Fault.BROKEN and not self._answered
        # The probes connect directly, which is no way to the verifier if there is a proxy.
        if self._proxy or not self._secure or not (our_certificate or failure.fault == Fault.TLS):
            return failure
        if time.monotonic() - self._diagnosis[0] >= COOLDOWN_SECONDS:
            probe = (
                probe_tls_alert(self._host, self._port, self._trust) if our_certificate else probe_over_http(self._host)
            )
            self._diagnosis = (time.monotonic(), await probe)
        return LinkFailure(str(failure), self._diagnosis[1] or failure.fault)

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
                # A peer answered but does not speak this HTTP version: the next attempt uses the other one.
                self._clear_http2 = not self._clear_http2
                await self._http.aclose()
                self._http = self._connections(None, http1=not self._clear_http2, http2=self._clear_http2)
            raise
        except ValueError as error:
            # After the first request of a connection was cancelled, httpcore's stream semaphore is out of step.
            if "semaphore" not in str(error):
                raise
            raise httpx.LocalProtocolError(str(error), request=request) from error
        self._guessing, self._answered = False, True
        return response

    async def _trace(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's trace extension: count bytes, and configure HTTP/2 once a connection is up."""
        await self._meter.trace(event, info)
        if event == "http2.send_connection_init.complete" and self._pool is not None:
            use_lean_headers(self._pool)

    def _connections(
        self, transport: httpx.AsyncBaseTransport | None, *, http1: bool, http2: bool
    ) -> httpx.AsyncClient:
        transport = transport or new_transport(self._trust, http1=http1, http2=http2, proxy=self._proxy)
        self._pool = getattr(transport, "_pool", None)
        client = httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS))
        # Bytes count on a metered link, and the verifier reads none of these headers.
        for name in ("accept", "connection", "user-agent"):
            del client.headers[name]
        client.headers.update(UNCOMPRESSED)
        if self._token:
            client.headers["authorization"] = f"Bearer {self._token}"
        return client


def _error_from(response: httpx.Response, body: bytes) -> Exception:
    try:
        refusal = messages.decode(body, messages.ErrorReply, messages.MSGPACK)
    except InputError:
        message = f"{response.url} answered {response.status_code}, but not as a verifier does"
        if response.status_code >= 500 or response.status_code == 429:
            return LinkFailure(message, Fault.UNAVAILABLE)
        hint = f"{message}; is this the URL of a verifier?"
        return VerifierRefused(ErrorCode.UNKNOWN_ROUTE, hint, response.status_code)
    code, sentence = refusal.code[:MAX_CODE_CHARACTERS], refusal.message[:MAX_SENTENCE_CHARACTERS]
    return VerifierRefused(code, sentence, response.status_code, refusal.detail, _retry_after(response.headers))


def _retry_after(headers: httpx.Headers) -> int | None:
    """Retry-After in seconds, if it is a number. Dates are ignored: the clocks may differ."""
    value = headers.get("retry-after", "")
    return min(int(value), MAX_RETRY_AFTER_SECONDS) if value.isascii() and value.isdigit() and len(value) < 10 else None
