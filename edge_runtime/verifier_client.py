"""Talks to a verifier: sessions and rounds over one kept-alive connection, and what to do when it breaks.

A round is idempotent, so whatever goes wrong below HTTP is repeated until the deadline. A lost session is opened again
with all ids so far on the same target version; the text goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import TracebackType
from typing import TypeVar

import httpx
import msgspec
import tenacity

from edge_runtime.contract import wire
from edge_runtime.contract.coupling import Sampling
from edge_runtime.contract.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.contract.wire import ErrorCode, Frame, Message, OpenReply, OpenRequest, RoundRequest
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


class Said(msgspec.Struct, frozen=True):
    """News of a round.

    Attributes:
        accepted: draft tokens that the target accepted.
        own: the target's own tokens behind them.
        frame: timings and the like, as the verifier reports them for the round so far.
    """

    accepted: list[int]
    own: list[int]
    frame: Frame


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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            http2: use HTTP/2 where the verifier offers it.
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
        self._http = _http_client(transport or httpx.AsyncHTTPTransport(http1=not self._guessing, http2=http2))
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

    def session(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        model: str = "",
        vocabulary: str = "",
        draft: str = "",
    ) -> VerifierSession:
        """A session, to be opened by its first round (see `wire.OpenRequest` for the arguments)."""
        opening = OpenRequest(
            wire.VERSION,
            key="",
            prompt=list(prompt),
            first=RoundRequest(wire.VERSION, 0, 0),
            sampling=sampling,
            model=model,
            vocabulary=vocabulary,
            draft=draft,
        )
        return VerifierSession(self, opening)

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
                self._http = _http_client(
                    httpx.AsyncHTTPTransport(http1=not self._clear_http2, http2=self._clear_http2)
                )
            raise
        self._guessing = False
        return response


class VerifierSession:
    """One text on a verifier.

    Attributes:
        ids: the prompt and all verified ids so far.
        version: the exact target version, once opened.
        finish: why the text ended, or empty.
        recoveries: how often the session was lost and opened again.
    """

    def __init__(self, client: VerifierClient, opening: OpenRequest) -> None:
        self.ids = list(opening.prompt)
        self.version = ""
        self.finish = ""
        self.recoveries = 0
        self._client = client
        self._opening = opening
        self._id = ""
        self._round = 0

    def play_early(
        self, after: list[int], draft: list[int], siblings: dict[int, list[int]] | None = None
    ) -> EarlyRound | None:
        """Sends the next round before the one in flight is answered; to be handed to `play`, or dropped.

        Args:
            after: what the round in flight must add to `ids` exactly; otherwise this one is void, and costs nothing.
            draft, siblings: see `wire.RoundRequest`.

        Returns:
            None while the session is not open yet.
        """
        if not self._id:
            return None
        position = len(self.ids) + len(after)
        request = RoundRequest(
            wire.VERSION, self._round + 1, position, draft, siblings=siblings or {}, expects=after[-1:]
        )
        return EarlyRound(self._client, _Playing(self, request), self._id)

    async def play(
        self,
        draft: list[int],
        *,
        siblings: dict[int, list[int]] | None = None,
        n: int = 1,
        stream: bool = False,
        early: EarlyRound | None = None,
    ) -> AsyncIterator[Said]:
        """Plays one round; yields what the verifier says, as it comes, each token once and already part of `ids`.

        Args:
            draft, siblings, n, stream: see `wire.RoundRequest`.
            early: this very round, if it was sent before the last one was answered, and that one came out as it says.

        Raises:
            VerifierRefused: the verifier will not play this round.
            VerifierUnreachable: it cannot be reached within the client's deadline.
        """
        until = time.monotonic() + self._client.deadline
        # A session that was lost in between knows nothing of the early round.
        if early and early.session != self._id:
            early.drop()
            early = None
        playing = early.playing if early else self._start(draft, siblings or {}, n, stream)
        while True:
            try:
                said = await self._client.persist(playing.listen, until)
            except VerifierRefused as refused:
                if refused.code != ErrorCode.SESSION_LOST:
                    if early is None:
                        raise
                    # It overtook the round before it, for instance: nothing was played, so it can be asked anew.
                    early, playing = None, self._start(draft, siblings or {}, n, stream)
                    continue
                self._id = ""
                self.recoveries += 1
                # What was told already is part of the new session's prompt; the rest of the round is played again.
                left = ([], {}, max(1, n - playing.own)) if playing.told else (draft, siblings or {}, n)
                playing = self._start(*left, stream)
                continue
            self.ids += said.accepted + said.own
            if not said.frame.more:
                self._round += 1
                self.finish = said.frame.finish
            yield said
            if not said.frame.more:
                return

    def close(self) -> None:
        """Lets the verifier free the session, in the background."""
        if self._id:
            self._client.close_session(self._id)
            self._id = ""

    async def frames(self, request: RoundRequest) -> AsyncIterator[Frame]:
        """Sends `request`, inside an opening if there is no session yet, and yields the answer's frames, once.

        Raises BrokenAnswer when they end early, and what `VerifierClient.exchange` raises.
        """
        opening = not self._id
        path = "/v1/sessions" if opening else f"/v1/sessions/{self._id}/rounds"
        message = msgspec.structs.replace(self._opening, first=request) if opening else request
        more = True
        async with self._client.exchange("POST", path, message) as response:
            async for body in _bodies(response):
                if not more:
                    raise BrokenAnswer("the answer goes on behind its last frame")
                if opening:
                    reply = parsed(body, OpenReply)
                    self._id, self.version = reply.session, reply.version
                    opening, frame = False, reply.first
                else:
                    frame = parsed(body, Frame)
                if frame.round != request.round or frame.accepted > len(request.draft):
                    raise BrokenAnswer(f"an answer to round {frame.round}, not {request.round}")
                more = frame.more
                yield frame
        if more:
            raise BrokenAnswer("the answer ended before its last frame")

    def _start(self, draft: list[int], siblings: dict[int, list[int]], n: int, stream: bool) -> _Playing:
        if not self._id:
            self._round = 0
            # Pinned, once opened: a text is never continued by another version.
            self._opening = msgspec.structs.replace(
                self._opening,
                key=secrets.token_urlsafe(9),
                prompt=list(self.ids),
                model=self.version or self._opening.model,
            )
        return _Playing(self, RoundRequest(wire.VERSION, self._round, len(self.ids), draft, n, siblings, stream))


class EarlyRound:
    """A round that was sent before the last one was answered.

    Attributes:
        session: the id of the session that it was sent to.
        playing: the round itself.
    """

    def __init__(self, client: VerifierClient, playing: _Playing, session: str) -> None:
        self.session = session
        self.playing = playing
        self._client = client
        self._first = playing.first = asyncio.get_running_loop().create_task(playing.listen())

    def drop(self) -> None:
        """The last round came out otherwise: the verifier will say that this one is void, and nobody listens."""

        async def await_end() -> None:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._first

        self._client.in_background(await_end())


class _Playing:
    """One round, asked for as often as it takes; remembers what was told.

    Attributes:
        first: the first call of `listen`, where it was made already.
    """

    first: asyncio.Task[Said] | None = None

    def __init__(self, session: VerifierSession, request: RoundRequest) -> None:
        self.told = 0
        self.own = 0
        self._session = session
        self._request = request
        self._frames: AsyncIterator[Frame] | None = None
        self._heard: list[int] = []
        self._accepted = 0

    async def listen(self) -> Said:
        """The next news. After any failure, the next call asks for the whole round again and skips what was told."""
        first = self.first
        if first and first is not asyncio.current_task():
            self.first = None
            return await first
        try:
            while True:
                if self._frames is None:
                    self._frames, self._heard, self._accepted = self._session.frames(self._request), [], 0
                frame = await anext(self._frames)
                if not frame.more:
                    # The connection is free for the next round only when the answer was read to its end.
                    async for _ in self._frames:
                        pass
                self._heard += self._request.draft[: frame.accepted] + frame.tokens
                self._accepted += frame.accepted
                fresh = self._heard[self.told :]
                if not fresh and frame.more:
                    continue
                accepted = fresh[: max(0, self._accepted - self.told)]
                own = fresh[len(accepted) :]
                self.told += len(fresh)
                self.own += len(own)
                return Said(accepted, own, frame)
        except BaseException:
            self._frames = None
            raise


def parsed(body: bytes, kind: type[M]) -> M:
    """A message of the verifier. Raises BrokenAnswer if it is none."""
    try:
        message = wire.decode(body, kind, wire.MSGPACK)
    except InputError as error:
        raise BrokenAnswer(str(error)) from None
    return message


async def _bodies(response: httpx.Response) -> AsyncIterator[bytes]:
    """The messages in an answer, streamed or not."""
    if response.headers.get("content-type") != wire.STREAMS[wire.MSGPACK]:
        yield await response.aread()
        return
    splitter = wire.FrameSplitter(wire.MSGPACK)
    async for piece in response.aiter_bytes():
        try:
            bodies = list(splitter.feed(piece))
        except InputError as error:
            raise BrokenAnswer(str(error)) from None
        for body in bodies:
            yield body
    if splitter.incomplete:
        raise BrokenAnswer("the answer ended in mid-message")


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


def _http_client(transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
    client = httpx.AsyncClient(
        transport=transport,
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
    )
    # Every byte counts on a metered link, and nobody reads these.
    for name in ("accept", "accept-encoding", "connection", "user-agent"):
        del client.headers[name]
    return client
