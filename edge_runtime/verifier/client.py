"""The client of one or several verifiers: endpoint selection, retries with backoff, and a deadline for all attempts."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
import tenacity

from edge_runtime.common.http_client import read_answer
from edge_runtime.probes import ByteMeter
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.protocol.messages import ErrorCode, Message
from edge_runtime.verifier.endpoint import UNHEALTHY, Endpoint
from edge_runtime.verifier.link_faults import HINTS, BrokenAnswer, Fault, LinkFailure, LinkState

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# Chosen: the verifier evicts abandoned sessions anyway, so an explicit close is not worth a long wait.
CLOSE_SECONDS = 2.0
# A check of a verifier includes name resolution and diagnosis; an answer that trickles in would last for ever. Chosen.
CHECK_SECONDS = 60.0
# Refusals worth retrying. After `internal` the session is lost, which the retried round reports.
TRANSIENT_CODES = UNHEALTHY | {ErrorCode.DAMAGED, ErrorCode.RATE_LIMITED, ErrorCode.TOO_SLOW}
# Attempts at a URL that does not answer like a verifier. More than one, because a damaged answer looks the same.
UNKNOWN_ROUTE_ATTEMPTS = 3
# Exponential backoff with full jitter between attempts: first and longest upper bound of the pause.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 1.0


class VerifierClient:
    """Connections to one or several verifiers, shared by any number of concurrent sessions. An async context manager.

    Attributes:
        endpoints: the verifiers in order of preference.
        deadline: seconds within which a round must succeed, all retries included.
        meter: counts the bytes of all connections.
        retries: number of attempts that were retries.
        latest_models: the last list of models that a verifier sent; None before the first.
    """

    def __init__(
        self,
        url: str | list[str],
        *,
        deadline: float = 30.0,
        http2: bool = True,
        token: str = "",
        authorities: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
        proxy: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            url: base URL, or several in order of preference; the others are used while the first is unreachable.
            http2: use HTTP/2 if the verifier offers it.
            token: bearer token; empty for none.
            authorities: PEM file of certificate authorities to trust instead of the system's.
            certificate: PEM files of this board's client certificate and private key.
            proxy: URL of an HTTP proxy; empty for none. The variables HTTP_PROXY, ALL_PROXY and so on are ignored.
            transport: replaces the network, for tests.

        Raises:
            InputError: `url` or `proxy` is not an http or https URL, or a PEM file cannot be used.
        """
        self.deadline = deadline
        self.meter = ByteMeter()
        self.retries = 0
        self.latest_models: messages.ModelList | None = None
        trust = _trust(authorities, certificate)
        self.endpoints = [
            Endpoint(each, self.meter, http2=http2, token=token, trust=trust, proxy=proxy, transport=transport)
            for each in ([url] if isinstance(url, str) else url)
        ]
        self._closed = False
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> VerifierClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Wait for background work, then close the connections."""
        self._closed = True
        await asyncio.gather(*self._closing)
        for endpoint in self.endpoints:
            await endpoint.aclose()

    @property
    def url(self) -> str:
        """Base URL of the verifier that the next request would use."""
        return self.pick().url

    @property
    def trouble(self) -> LinkFailure | None:
        """The last failure of the preferred endpoint; None if it works."""
        return self.pick().trouble

    @property
    def link_state(self) -> LinkState:
        """Whether any of the verifiers can be used."""
        problems = [endpoint.problem for endpoint in self.endpoints]
        if any(e.answered_at is not None and not p for e, p in zip(self.endpoints, problems, strict=True)):
            return LinkState(True)
        known = [problem for problem in problems if problem is not None]
        return LinkState(False, known[0]) if len(known) == len(problems) else LinkState(None)

    async def check(self) -> None:
        """Ask the verifiers for their models, the preferred one first, until one answers; updates `link_state`.

        Takes a minute at most for each of them.
        """
        for endpoint in self.endpoints:
            with contextlib.suppress(LinkFailure, VerifierRefused, TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._fetch_models(endpoint)
                return

    def pick(self, without: Collection[Endpoint] = ()) -> Endpoint:
        """The first healthy endpoint, or the one whose last failure is oldest if none is healthy."""
        candidates = [endpoint for endpoint in self.endpoints if endpoint not in without] or self.endpoints
        healthy = next((endpoint for endpoint in candidates if endpoint.healthy), None)
        return healthy or min(candidates, key=lambda endpoint: endpoint.failed_at)

    def set_token(self, token: str) -> None:
        """Use another bearer token from now on; empty for none."""
        for endpoint in self.endpoints:
            endpoint.set_token(token)

    async def models(self) -> messages.ModelList:
        """The target versions that the verifier serves. Raises VerifierError."""

        return await self.retry(lambda: self._fetch_models(self.pick()), time.monotonic() + self.deadline)

    async def retry(self, attempt: Callable[[], Awaitable[T]], until: float, *, patient: bool = True) -> T:
        """Call `attempt` with backoff until it succeeds or `until` (`time.monotonic`) has passed.

        Args:
            patient: wait for an unreachable verifier. If false, retry only while some endpoint is healthy: once after a
                broken connection, because a kept-alive one may have been closed by the peer, then at the other
                endpoints.

        Raises:
            VerifierRefused: for a reason that retrying does not change, or that lasted until the deadline.
            VerifierUnreachable: no usable answer before the deadline.
        """
        started = time.monotonic()
        backoff = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS)

        def pause(state: tenacity.RetryCallState) -> float:
            requested = self._retry_after(state)
            wait = requested + backoff(state) if requested or patient else 0.0
            return min(wait, max(0.0, until - time.monotonic()))

        def give_up(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + self._retry_after(state) >= until

        try:
            async for trial in tenacity.AsyncRetrying(
                retry=_is_transient if patient else self._is_transient_and_healthy,
                wait=pause,
                stop=give_up,
                reraise=True,
            ):
                with trial:
                    self.retries += trial.retry_state.attempt_number > 1
                    async with asyncio.timeout(max(0.001, until - time.monotonic())):
                        return await attempt()
        except (LinkFailure, TimeoutError) as error:
            failure = error if isinstance(error, LinkFailure) else self.trouble
            fault = failure.fault if failure else Fault.TIMED_OUT
            urls = " and ".join(endpoint.url for endpoint in self.endpoints)
            cause = str(failure or "") or "no answer"
            raise VerifierUnreachable(
                f"no usable answer from {urls} within {time.monotonic() - started:.3g} s ({cause}): {HINTS[fault]}",
                fault,
            ) from error
        raise AssertionError("tenacity ends by returning or raising")

    def close_session(self, endpoint: Endpoint, session_id: str) -> None:
        """Close a session in the background; failures are ignored."""

        async def close() -> None:
            with contextlib.suppress(LinkFailure, VerifierRefused, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    async with endpoint.exchange("DELETE", f"/v1/sessions/{session_id}", None):
                        pass

        self.in_background(close())

    def in_background(self, work: Coroutine[None, None, None]) -> None:
        """Run `work`, which must be brief and raise nothing, in the background; `aclose` waits for it."""
        if self._closed:
            # A session was discarded after its client had been closed.
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _fetch_models(self, endpoint: Endpoint) -> messages.ModelList:
        async with endpoint.exchange("GET", "/v1/models", None) as response:
            self.latest_models = parsed(await read_answer(response, messages.MAX_REPLY_BYTES), messages.ModelList)
        return self.latest_models

    def _is_transient_and_healthy(self, state: tenacity.RetryCallState) -> bool:
        return self.pick().healthy and _is_transient(state)

    def _retry_after(self, state: tenacity.RetryCallState) -> float:
        """Seconds of Retry-After if the next attempt goes to the same verifier; 0 otherwise or if absent."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, VerifierRefused) or error.retry_after is None:
            return 0.0
        # A rate limit concerns this board, not the verifier: another verifier does not avoid it.
        elsewhere = error.code != ErrorCode.RATE_LIMITED and len(self.endpoints) > 1 and self.pick().healthy
        return 0.0 if elsewhere else float(error.retry_after)


def _trust(authorities: Path | None, certificate: tuple[Path, Path] | None) -> ssl.SSLContext | bool:
    """The TLS context for these authorities and client certificate; True for the default. Raises InputError."""
    trust: ssl.SSLContext | None = None
    if authorities is not None:
        try:
            trust = ssl.create_default_context(cafile=authorities)
        except OSError as error:
            raise InputError(f"cannot trust the authorities in {authorities}: {error}") from None
    if certificate is not None:
        trust = trust or httpx.create_ssl_context()
        try:
            # An empty password keeps OpenSSL from prompting on the terminal.
            trust.load_cert_chain(*certificate, password=lambda: "")
        except OSError as error:
            raise InputError(f"cannot use the certificate {certificate[0]} with {certificate[1]}: {error}") from None
    return trust or True


def parsed(body: bytes, kind: type[M], session: str = "") -> M:
    """Decode a message of the verifier; for `session` see `messages.encode`. Raises BrokenAnswer if it is malformed."""
    try:
        message = messages.decode(body, kind, messages.MSGPACK, session)
    except InputError as error:
        raise BrokenAnswer(str(error)) from None
    return message


def _is_transient(state: tenacity.RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, VerifierRefused):
        unrecognized = error.code == ErrorCode.UNKNOWN_ROUTE and state.attempt_number < UNKNOWN_ROUTE_ATTEMPTS
        return unrecognized or error.code in TRANSIENT_CODES
    return isinstance(error, LinkFailure)
