"""One generation on a verifier: its session and its rounds.

A round is idempotent, so transport failures are retried until the deadline. A lost session is reopened with all ids so
far on the same target version, at another endpoint if its own is unreachable; the text continues unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import msgspec

from edge_runtime.common.http_client import read_answer, read_pieces
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, OpenReply, OpenRequest, RoundRequest, TokenLogprobs
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import CLOSE_SECONDS, VerifierClient, parsed
from edge_runtime.verifier.endpoint import Endpoint
from edge_runtime.verifier.link_faults import BrokenAnswer


class RoundUpdate(msgspec.Struct, frozen=True):
    """Newly verified tokens of a round.

    Attributes:
        accepted: draft tokens that the target accepted.
        own: the target's own tokens that follow them.
        frame: the verifier's frame that completed them, with its timings and load.
        logprobs: log-probabilities of `accepted` and `own`, if they were asked for.
    """

    accepted: list[int]
    own: list[int]
    frame: Frame
    logprobs: list[TokenLogprobs] = []


class VerifierSession:
    """The session of one generation on a verifier.

    Attributes:
        ids: the prompt and all verified ids so far.
        version: the exact target version; empty until the session is open.
        finish: finish reason; empty while the text continues.
        recoveries: how often a lost session was reopened.
        cached: tokens of the prompt whose KV cache the verifier had when the session was first opened.
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
        generated: int = 0,
        logprobs: int = 0,
    ) -> None:
        """The first round opens the session; see `messages.OpenRequest` for the arguments.

        Args:
            patient: wait for an unreachable verifier until the client's deadline, instead of failing at once.
            generated: how many of the last ids of `prompt` were not in the prompt of the text.
        """
        self.ids = list(prompt)
        self.version = ""
        self.finish = ""
        self.recoveries = 0
        self.cached = 0
        self._client = client
        self._opening = OpenRequest(
            messages.PROTOCOL_VERSION,
            key="",
            prompt=list(prompt),
            first=RoundRequest(messages.PROTOCOL_VERSION, 0, 0),
            sampling=sampling,
            model=model,
            vocabulary=vocabulary,
            draft=draft,
            logprobs=logprobs,
        )
        self._patient = patient
        self._id = ""
        self._prompt_length = len(prompt) - generated
        self._needs_generated = sampling.depends_on_prompt_end or generated > 0
        self._endpoint = client.pick()
        # Endpoints that do not serve this session's target.
        self._unsuitable: set[Endpoint] = set()
        self._round = 0

    def send_early_round(
        self, after: list[int], draft: list[int], siblings: dict[int, list[int]] | None = None
    ) -> EarlyRound | None:
        """Send the next round before the one in flight is answered; pass the result to `run_round`, or drop it.

        Args:
            after: the exact ids that the round in flight must append; otherwise the verifier voids this round at no
                cost.
            draft, siblings: see `messages.RoundRequest`.

        Returns:
            None if the session is not open yet.
        """
        if not self._id:
            return None
        position = len(self.ids) + len(after)
        request = RoundRequest(
            messages.PROTOCOL_VERSION, self._round + 1, position, draft, siblings=siblings or {}, expects=after[-1:]
        )
        return EarlyRound(self._client, _ActiveRound(self, request), self._id)

    async def run_round(
        self,
        draft: list[int],
        *,
        siblings: dict[int, list[int]] | None = None,
        n: int = 1,
        stream: bool = False,
        early: EarlyRound | None = None,
    ) -> AsyncGenerator[RoundUpdate, None]:
        """Run one round; yield verified tokens as they arrive, each once and already appended to `ids`.

        Args:
            draft, siblings, n, stream: see `messages.RoundRequest`.
            early: this same round if it was already sent by `send_early_round` and the previous round ended as it
                assumed.

        Raises:
            VerifierRefused: the verifier refuses this round.
            VerifierUnreachable: no verifier can be reached within the client's deadline.
        """
        until = time.monotonic() + self._client.deadline
        # The session was lost in between, and the early round with it.
        if early and early.session != self._id:
            early.drop()
            early = None
        active = early.round if early else self._start(draft, siblings or {}, n, stream)
        while True:
            try:
                update = await self._client.retry(active.next_update, until, patient=self._patient)
            except VerifierRefused as refused:
                if refused.code == ErrorCode.UNKNOWN_MODEL and not self._id and self._has_alternatives():
                    self._unsuitable.add(self._endpoint)
                    continue
                if refused.code != ErrorCode.SESSION_LOST:
                    if early is None:
                        raise
                    # For instance it overtook the previous round. Nothing was run, so send it again.
                    early, active = None, self._start(draft, siblings or {}, n, stream)
                    continue
                self._id = ""
                self.recoveries += 1
                # Tokens that were already yielded are part of the new session's prompt; run the rest of the round
                # again.
                rest = ([], {}, max(1, n - active.own)) if active.yielded else (draft, siblings or {}, n)
                active = self._start(*rest, stream)
                continue
            self.ids += update.accepted + update.own
            if not update.frame.more:
                self._round += 1
                self.finish = update.frame.finish
            yield update
            if not update.frame.more:
                return

    def close(self) -> None:
        """Let the verifier free the session, in the background."""
        if self._id:
            self._client.close_session(self._endpoint, self._id)
            self._id = ""

    async def frames(self, request: RoundRequest) -> AsyncIterator[Frame]:
        """Send `request`, wrapped in an opening if there is no session yet, and yield the reply's frames.

        Raises BrokenAnswer if they end early or do not belong to this round, and what `Endpoint.exchange` raises.
        """
        opening = not self._id
        if opening:
            self._endpoint = self._client.pick(self._unsuitable)
        elif not self._endpoint.healthy and self._client.pick(self._unsuitable) is not self._endpoint:
            raise VerifierRefused(
                ErrorCode.SESSION_LOST, f"{self._endpoint.url} is unreachable, and another verifier is available"
            )
        path = "/v1/sessions" if opening else f"/v1/sessions/{self._id}/rounds"
        message = msgspec.structs.replace(self._opening, first=request) if opening else request
        more = True
        async with self._endpoint.exchange("POST", path, message, self._id) as response:
            async for body in _bodies(response):
                if not more:
                    raise BrokenAnswer("the answer continues after its last frame")
                if opening:
                    reply = parsed(body, OpenReply)
                    if not reply.session.startswith(messages.session_id_prefix(self._opening.key)):
                        raise BrokenAnswer("an answer to another opening")
                    if not self.version:
                        self.cached = reply.cached
                    self._id, self.version = reply.session, reply.version
                    self._needs_generated |= reply.needs_generated
                    opening, frame = False, reply.first
                else:
                    frame = parsed(body, Frame, self._id)
                if frame.round != request.round or frame.accepted > len(request.draft):
                    raise BrokenAnswer(f"an answer to round {frame.round}, not {request.round}")
                count = frame.accepted + len(frame.tokens)
                if self._opening.logprobs and len(frame.logprobs) != count:
                    raise BrokenAnswer(f"log-probabilities of {len(frame.logprobs)} tokens for {count} tokens")
                more = frame.more
                yield frame
        if more:
            raise BrokenAnswer("the answer ended before its last frame")

    def _has_alternatives(self) -> bool:
        return len(self._unsuitable) + 1 < len(self._client.endpoints)

    def _start(self, draft: list[int], siblings: dict[int, list[int]], n: int, stream: bool) -> _ActiveRound:
        if not self._id:
            self._round = 0
            # Once open, the version is pinned: no other version may continue the text.
            self._opening = msgspec.structs.replace(
                self._opening,
                key=secrets.token_urlsafe(9),
                prompt=list(self.ids),
                model=self.version or self._opening.model,
                generated=len(self.ids) - self._prompt_length if self._needs_generated else 0,
            )
        return _ActiveRound(
            self,
            RoundRequest(
                v=messages.PROTOCOL_VERSION,
                round=self._round,
                position=len(self.ids),
                draft=draft,
                n=n,
                siblings=siblings,
                stream=stream,
            ),
        )


class EarlyRound:
    """A round that was sent before the previous one was answered.

    Attributes:
        session: id of the session that it was sent to.
    """

    def __init__(self, client: VerifierClient, round: _ActiveRound, session: str) -> None:
        self.session = session
        self.round = round
        self._client = client
        self._first = round.first = asyncio.get_running_loop().create_task(round.next_update())
        # The caller that awaits the round gets its error. If none does, the error does not matter, and asyncio must not
        # log it.
        self._first.add_done_callback(lambda task: task.cancelled() or task.exception())

    def drop(self) -> None:
        """The previous round ended differently: the verifier voids this one, and its reply is discarded."""

        async def await_end() -> None:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._first

        self._client.in_background(await_end())


class _ActiveRound:
    """One round, requested as often as needed; keeps track of the tokens already yielded.

    Attributes:
        first: the first call of `next_update`, if it was started early.
    """

    first: asyncio.Task[RoundUpdate] | None = None

    def __init__(self, session: VerifierSession, request: RoundRequest) -> None:
        self.yielded = 0
        self.own = 0
        self._session = session
        self._request = request
        self._frames: AsyncIterator[Frame] | None = None
        self._received: list[int] = []
        self._received_logprobs: list[TokenLogprobs] = []
        self._accepted = 0

    async def next_update(self) -> RoundUpdate:
        """The next tokens. After a failure, the next call requests the whole round again and skips what was yielded."""
        first = self.first
        if first and first is not asyncio.current_task():
            self.first = None
            return await first
        try:
            while True:
                if self._frames is None:
                    self._frames = self._session.frames(self._request)
                    self._received, self._received_logprobs, self._accepted = [], [], 0
                frame = await anext(self._frames)
                if not frame.more:
                    # The connection can be reused only after the answer was read to its end.
                    async for _ in self._frames:
                        pass
                self._received += self._request.draft[: frame.accepted] + frame.tokens
                self._received_logprobs += frame.logprobs
                self._accepted += frame.accepted
                fresh = self._received[self.yielded :]
                if not fresh and frame.more:
                    continue
                accepted = fresh[: max(0, self._accepted - self.yielded)]
                own = fresh[len(accepted) :]
                logprobs = self._received_logprobs[self.yielded :]
                self.yielded += len(fresh)
                self.own += len(own)
                return RoundUpdate(accepted, own, frame, logprobs)
        except BaseException:
            self._frames = None
            raise


async def _bodies(response: httpx.Response) -> AsyncIterator[bytes]:
    """The encoded messages of a reply, streamed or not."""
    if response.headers.get("content-type") != messages.STREAM_MEDIA_TYPES[messages.MSGPACK]:
        yield await read_answer(response, messages.MAX_REPLY_BYTES)
        return
    splitter = messages.FrameSplitter(messages.MSGPACK)
    async for piece in read_pieces(response, messages.MAX_REPLY_BYTES):
        try:
            bodies = list(splitter.feed(piece))
        except InputError as error:
            raise BrokenAnswer(str(error)) from None
        for body in bodies:
            yield body
    if splitter.incomplete:
        raise BrokenAnswer("the answer ended in mid-message")
