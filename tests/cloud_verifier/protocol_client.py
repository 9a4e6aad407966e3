"""A client that says exactly what a test wants said, right or wrong, over real HTTP."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import httpx
from anyio.from_thread import start_blocking_portal

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import KVCachePool
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import ErrorReply, Frame, Message, OpenReply, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.conftest import serving

GREEDY = Sampling()
PROMPT = [10, 20, 30, 40]

M = TypeVar("M", bound=Message)
_keys = itertools.count()


@contextlib.contextmanager
def running(target: Target, limits: VerifierLimits | None = None, **options: object) -> Iterator[str]:
    """`serving` in a thread of its own, for tests that are no coroutines; yields the URL."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving(target, limits, **options)) as server,
    ):
        yield server.url


def opening(prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, **changes: Any) -> OpenRequest:
    """A fresh opening; `changes` are fields of OpenRequest (its `draft` is called `identity`) or of its first round."""
    first_draft, changes["draft"] = changes.pop("draft", []), changes.pop("identity", "")
    fields = {name: changes.pop(name) for name in list(changes) if name in OpenRequest.__struct_fields__}
    first = {"v": messages.PROTOCOL_VERSION, "round": 0, "position": len(prompt), "draft": first_draft} | changes
    settled = {"v": messages.PROTOCOL_VERSION, "key": f"key-{next(_keys):06}", "first": RoundRequest(**first)} | fields
    return OpenRequest(prompt=prompt, sampling=sampling, **settled)


class ObservedTarget(Target):
    """A target, loaded already, that counts its forwards and can be held up before the next one.

    Attributes:
        forwards: that chose something, so far.
        reached: a forward is held up.
    """

    def __init__(self, target: Target) -> None:
        vars(self).update(vars(target))
        self.forwards = 0
        self.reached = threading.Event()
        self._released = threading.Event()
        self._released.set()

    def hold(self) -> None:
        self.reached.clear()
        self._released.clear()

    def release(self) -> None:
        self._released.set()

    def run(self, pool: KVCachePool, pieces: Sequence[Segment]) -> list[SampledTokens | None]:
        if not self._released.is_set():
            self.reached.set()
            self._released.wait(20)
        self.forwards += any(piece.sampling for piece in pieces)
        return super().run(pool, pieces)


class Session:
    """An open session and its text, as the client knows it."""

    def __init__(self, talker: ProtocolClient, reply: OpenReply, request: OpenRequest) -> None:
        self._talker = talker
        self.id = reply.session
        self.reply = reply
        self.number = 0
        self.ids = list(request.prompt)
        self.take(request.first, reply.first)

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.id}/rounds"

    def next(self, **changes: Any) -> RoundRequest:
        """The next round, correct but for `changes`."""
        return RoundRequest(
            **{"v": messages.PROTOCOL_VERSION, "round": self.number + 1, "position": len(self.ids)} | changes
        )

    def play(self, **changes: Any) -> Frame:
        """Plays the next round and takes its tokens."""
        request = self.next(**changes)
        self.take(request, self._talker.told(self._talker.post(self.path, request), Frame))
        return self.frame

    def take(self, request: RoundRequest, frame: Frame) -> None:
        """Believes what the verifier answered to `request`."""
        self.frame, self.number = frame, request.round
        self.ids += request.draft[: frame.accepted] + frame.tokens


class ProtocolClient:
    """Speaks one encoding with one verifier."""

    def __init__(self, url: str, media_type: str = messages.MSGPACK, token: str = "", **options: Any) -> None:
        self.media_type = media_type
        headers = {"content-type": media_type} | ({"authorization": f"Bearer {token}"} if token else {})
        self.http = httpx.Client(base_url=url, headers=headers, timeout=20, **options)

    def __enter__(self) -> ProtocolClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, path: str, body: Message | bytes) -> httpx.Response:
        """Sends a message, or any bytes instead of one."""
        content = body if isinstance(body, bytes) else messages.encode(body, self.media_type, session_in(path))
        return self.http.post(path, content=content)

    def told(self, response: httpx.Response, kind: type[M]) -> M:
        """The message of a good answer."""
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == self.media_type
        return messages.decode(response.content, kind, self.media_type, session_in(response.request.url.path))

    def refused(self, response: httpx.Response, status: int, code: str) -> ErrorReply:
        """The refusal of a bad one; a sentence for people is part of it."""
        refusal = decode_error(response)
        assert (response.status_code, refusal.code) == (status, code)
        assert len(refusal.message.split()) > 3
        return refusal

    def open(self, prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, **changes: Any) -> Session:
        """Opens a session; see `opening`."""
        request = opening(prompt, sampling, **changes)
        return Session(self, self.told(self.post("/v1/sessions", request), OpenReply), request)


def session_in(path: str) -> str:
    """The session that a round at `path` belongs to; empty for other paths."""
    parts = path.split("/")
    return parts[3] if path.endswith("/rounds") else ""


def decode_error(response: httpx.Response) -> ErrorReply:
    """The body of a refusal, in the encoding that the response says it has."""
    return messages.decode(response.content, ErrorReply, response.headers["content-type"])
