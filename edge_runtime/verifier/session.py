"""One text on a verifier: its session, and its rounds.

A round is idempotent, so whatever goes wrong below HTTP is repeated until the deadline. A lost session is opened again
with all ids so far on the same target version, and elsewhere where its verifier is gone and there is another; the text
goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import msgspec

from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, OpenReply, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import CLOSE_SECONDS, VerifierClient, parsed
from edge_runtime.verifier.endpoint import Endpoint
from edge_runtime.verifier.link_faults import BrokenAnswer


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


class VerifierSession:
    """One text on a verifier.

    Attributes:
        ids: the prompt and all verified ids so far.
        version: the exact target version, once opened.
        finish: why the text ended, or empty.
        recoveries: how often the session was lost and opened again.
    """

    def __init__(
        self,
        client: VerifierClient,
        prompt: list[int],
        sampling: Sampling,
        *,
        model: str = "",
        vocabulary: str = "",
        draft: str = "",
        patient: bool = True,
    ) -> None:
        """To be opened by its first round; see `wire.OpenRequest` for the arguments.

        Args:
            patient: wait for a verifier that is gone, to the client's deadline; otherwise fail at once.
        """
        self.ids = list(prompt)
        self.version = ""
        self.finish = ""
        self.recoveries = 0
        self._client = client
        self._opening = OpenRequest(
            messages.VERSION,
            key="",
            prompt=list(prompt),
            first=RoundRequest(messages.VERSION, 0, 0),
            sampling=sampling,
            model=model,
            vocabulary=vocabulary,
            draft=draft,
        )
        self._patient = patient
        self._id = ""
        self._at = client.pick()
        # Verifiers that do not have this text's target.
        self._strangers: set[Endpoint] = set()
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
            messages.VERSION, self._round + 1, position, draft, siblings=siblings or {}, expects=after[-1:]
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
    ) -> AsyncGenerator[Said, None]:
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
                said = await self._client.persist(playing.listen, until, patient=self._patient)
            except VerifierRefused as refused:
                if refused.code == ErrorCode.UNKNOWN_MODEL and not self._id and self._others():
                    self._strangers.add(self._at)
                    continue
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
            self._client.close_session(self._at, self._id)
            self._id = ""

    async def frames(self, request: RoundRequest) -> AsyncIterator[Frame]:
        """Sends `request`, inside an opening if there is no session yet, and yields the answer's frames, once.

        Raises BrokenAnswer when they end early, and what `Endpoint.exchange` raises.
        """
        opening = not self._id
        if opening:
            self._at = self._client.pick(self._strangers)
        elif not self._at.well and self._client.pick(self._strangers) is not self._at:
            raise VerifierRefused(ErrorCode.SESSION_LOST, f"{self._at.url} is gone, and others are there", 404)
        path = "/v1/sessions" if opening else f"/v1/sessions/{self._id}/rounds"
        message = msgspec.structs.replace(self._opening, first=request) if opening else request
        more = True
        async with self._at.exchange("POST", path, message, self._id) as response:
            async for body in _bodies(response):
                if not more:
                    raise BrokenAnswer("the answer goes on behind its last frame")
                if opening:
                    reply = parsed(body, OpenReply)
                    if not reply.session.startswith(messages.mark_of(self._opening.key)):
                        raise BrokenAnswer("an answer to another opening")
                    self._id, self.version = reply.session, reply.version
                    opening, frame = False, reply.first
                else:
                    frame = parsed(body, Frame, self._id)
                if frame.round != request.round or frame.accepted > len(request.draft):
                    raise BrokenAnswer(f"an answer to round {frame.round}, not {request.round}")
                more = frame.more
                yield frame
        if more:
            raise BrokenAnswer("the answer ended before its last frame")

    def _others(self) -> bool:
        return len(self._strangers) + 1 < len(self._client.endpoints)

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
        return _Playing(self, RoundRequest(messages.VERSION, self._round, len(self.ids), draft, n, siblings, stream))


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


async def _bodies(response: httpx.Response) -> AsyncIterator[bytes]:
    """The messages in an answer, streamed or not."""
    if response.headers.get("content-type") != messages.STREAMS[messages.MSGPACK]:
        yield await response.aread()
        return
    splitter = messages.FrameSplitter(messages.MSGPACK)
    async for piece in response.aiter_bytes():
        try:
            bodies = list(splitter.feed(piece))
        except InputError as error:
            raise BrokenAnswer(str(error)) from None
        for body in bodies:
            yield body
    if splitter.incomplete:
        raise BrokenAnswer("the answer ended in mid-message")
