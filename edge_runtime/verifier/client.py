"""Talks to verifiers: which of them to ask, and attempts that are repeated until a deadline."""

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

from edge_runtime.probes.tcp import ByteMeter
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.protocol.messages import ErrorCode, Message
from edge_runtime.verifier.endpoint import UNWELL, Endpoint
from edge_runtime.verifier.link_faults import HINTS, BrokenAnswer, Fault, LinkFailure

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# A session whose board vanished is evicted anyway, so closing one politely is worth little waiting.
CLOSE_SECONDS = 2.0
# Refusals that another attempt may better. After `internal` the session is lost, and a repeated round finds that out.
PASSING_CODES = UNWELL | {ErrorCode.DAMAGED, ErrorCode.RATE_LIMITED}
# How often somebody is asked who does not answer as a verifier does: a damaged answer looks like that, too.
STRANGE_ANSWERS = 3
# Pauses between attempts, in seconds: they grow from the first, and are drawn at random up to that.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0


class VerifierClient:
    """Connections to one verifier or several, for any number of sessions at once. Use as an async context manager.

    Attributes:
        endpoints: the verifiers, the preferred one first.
        deadline: seconds within which a round must succeed, all attempts together.
        meter: bytes of all connections.
        retries: attempts that repeated another.
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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            url: base URL; or several, the preferred one first: the others are asked while it is gone.
            http2: use HTTP/2 where the verifier offers it.
            token: shown to the verifier, or to what stands in front of it, as bearer token; empty shows none.
            authorities: PEM file of those to trust for TLS, instead of the usual ones.
            certificate: PEM files of this board's own certificate and its key, for verifiers that ask for one.
            transport: instead of the network, for tests.

        Raises:
            InputError: `url` is not an http or https URL, or a file does not hold what it should.
        """
        self.deadline = deadline
        self.meter = ByteMeter()
        self.retries = 0
        trust = _trust(authorities, certificate)
        self.endpoints = [
            Endpoint(each, self.meter, http2=http2, token=token, trust=trust, transport=transport)
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
        """Waits for sessions that are being closed, and closes the connections."""
        self._closed = True
        await asyncio.gather(*self._closing)
        for endpoint in self.endpoints:
            await endpoint.aclose()

    @property
    def url(self) -> str:
        """Base URL of the verifier that would be asked now."""
        return self.pick().url

    @property
    def trouble(self) -> LinkFailure | None:
        """Why no verifier can be reached, as far as the last attempts tell; None where one can."""
        return self.pick().trouble

    def pick(self, without: Collection[Endpoint] = ()) -> Endpoint:
        """The first endpoint that is well; where none is, the one that has rested longest."""
        candidates = [endpoint for endpoint in self.endpoints if endpoint not in without] or self.endpoints
        well = next((endpoint for endpoint in candidates if endpoint.well), None)
        return well or min(candidates, key=lambda endpoint: endpoint.failed_at)

    def show(self, token: str) -> None:
        """From now on shows another token, or with an empty one none."""
        for endpoint in self.endpoints:
            endpoint.show(token)

    async def models(self) -> messages.ModelList:
        """What the verifier serves. Raises VerifierError."""

        async def fetch() -> messages.ModelList:
            async with self.pick().exchange("GET", "/v1/models", None) as response:
                return parsed(await response.aread(), messages.ModelList)

        return await self.persist(fetch, time.monotonic() + self.deadline)

    async def persist(self, attempt: Callable[[], Awaitable[T]], until: float, *, patient: bool = True) -> T:
        """Calls `attempt`, with growing, jittered pauses, until it works or `until` (`time.monotonic`) has passed.

        Args:
            patient: otherwise only as long as there is a verifier that may be well: one more chance where a connection
                broke, as those that are kept may have been closed at the other end, and then the others.

        Raises:
            VerifierRefused: for a reason that repeating does not better, or that lasted until the end.
            VerifierUnreachable: no usable answer until then.
        """
        started = time.monotonic()
        growing = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)

        def pause(state: tenacity.RetryCallState) -> float:
            asked = self._asked_to_wait(state)
            wait = asked + growing(state) if asked or patient else 0.0
            return min(wait, max(0.0, until - time.monotonic()))

        def give_up(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + self._asked_to_wait(state) >= until

        try:
            async for trial in tenacity.AsyncRetrying(
                retry=_may_pass if patient else self._may_pass_at_once,
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
        """Closes a session in the background; whether that works is of no consequence."""

        async def close() -> None:
            with contextlib.suppress(LinkFailure, VerifierRefused, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    async with endpoint.exchange("DELETE", f"/v1/sessions/{session_id}", None):
                        pass

        self.in_background(close())

    def in_background(self, work: Coroutine[None, None, None]) -> None:
        """Runs `work`, which raises nothing and is brief, beside everything else; `aclose` waits for it."""
        if self._closed:
            # A text that is thrown away after its client.
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _may_pass_at_once(self, state: tenacity.RetryCallState) -> bool:
        return self.pick().well and _may_pass(state)

    def _asked_to_wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds that the verifier asked for, where that is who would be asked again; 0 where it did not say."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, VerifierRefused) or error.retry_after is None:
            return 0.0
        # A limit of this board's is no fault of the verifier's: another one is no way around it.
        elsewhere = error.code != ErrorCode.RATE_LIMITED and len(self.endpoints) > 1 and self.pick().well
        return 0.0 if elsewhere else float(error.retry_after)


def _trust(authorities: Path | None, certificate: tuple[Path, Path] | None) -> ssl.SSLContext | bool:
    """What TLS is to believe, and to show. Raises InputError."""
    trust: ssl.SSLContext | None = None
    if authorities is not None:
        try:
            trust = ssl.create_default_context(cafile=authorities)
        except OSError as error:
            raise InputError(f"cannot trust the authorities in {authorities}: {error}") from None
    if certificate is not None:
        trust = trust or httpx.create_ssl_context()
        try:
            # Without a password nobody is asked for one.
            trust.load_cert_chain(*certificate, password=lambda: "")
        except OSError as error:
            raise InputError(f"cannot use the certificate {certificate[0]} with {certificate[1]}: {error}") from None
    return trust or True


def parsed(body: bytes, kind: type[M], session: str = "") -> M:
    """A message of the verifier; for `session` see `wire.encode`. Raises BrokenAnswer if it is none."""
    try:
        message = messages.decode(body, kind, messages.MSGPACK, session)
    except InputError as error:
        raise BrokenAnswer(str(error)) from None
    return message


def _may_pass(state: tenacity.RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, VerifierRefused):
        strange = error.code == ErrorCode.UNKNOWN_ROUTE and state.attempt_number < STRANGE_ANSWERS
        return strange or error.code in PASSING_CODES
    return isinstance(error, LinkFailure)
