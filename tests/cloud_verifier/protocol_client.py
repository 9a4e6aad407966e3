"""A client for tests: sends any message over real HTTP, valid or not, and tracks the text of a session."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

import httpx
from anyio.from_thread import start_blocking_portal

from cloud_verifier.api.app import VerifierLimits, VerifierService
from cloud_verifier.api.server import VerifierServer
from cloud_verifier.cli import serve
from cloud_verifier.cli.main import build_parser
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.kv_cache import KVCachePool
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.target import Target
from edge_runtime.common.http_server import ListenOptions
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import ErrorReply, Frame, Message, OpenReply, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.conftest import serving

GREEDY = Sampling()
PROMPT = [10, 20, 30, 40]
# A limit for hangs, not for slow machines.
TIMEOUT_SECONDS = 300

M = TypeVar("M", bound=Message)
_key_numbers = itertools.count()


@contextlib.contextmanager
def running(target: Target, limits: VerifierLimits | None = None, **options: object) -> Iterator[str]:
    """`serving` in a thread of its own, for tests that are not coroutines; yields the URL."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving(target, limits, **options)) as server,
    ):
        yield server.url


@contextlib.asynccontextmanager
async def listening(service: VerifierService) -> AsyncIterator[VerifierServer]:
    """A service on a free port of loopback."""
    server = VerifierServer(service, ListenOptions(port=0))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.contextmanager
def running_service(service: VerifierService) -> Iterator[str]:
    """`listening` in a thread of its own, with its target loaded; yields the URL."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(listening(service)) as server:
        while httpx.get(f"{server.url}/readyz").status_code != 200:
            assert service.failure is None
        yield server.url


def command_service(*arguments: object) -> VerifierService:
    """The service of `cloud-verifier serve` with these arguments, which starts no process here."""
    options = build_parser().parse_args(["serve", *map(str, arguments)])
    return serve._build_service(options, serve._target_loader(options), Authenticator(options.tokens))


@contextlib.asynccontextmanager
async def connected(
    target: Target, limits: VerifierLimits | None = None, media_type: str = messages.MSGPACK, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """`serving`, and a client of it that sends `media_type`; `options` are httpx's."""
    headers = {"content-type": media_type}
    async with (
        serving(target, limits) as server,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=TIMEOUT_SECONDS, **options) as client,
    ):
        yield client


def opening(prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, **changes: Any) -> OpenRequest:
    """An opening with a new key.

    `changes` are fields of OpenRequest (its `draft` is called `identity` here) or of the first round.
    """
    first_draft, changes["draft"] = changes.pop("draft", []), changes.pop("identity", "")
    open_fields = {name: changes.pop(name) for name in list(changes) if name in OpenRequest.__struct_fields__}
    round_fields = {"v": messages.PROTOCOL_VERSION, "round": 0, "position": len(prompt), "draft": first_draft} | changes
    defaults = {
        "v": messages.PROTOCOL_VERSION,
        "key": f"key-{next(_key_numbers):06}",
        "first": RoundRequest(**round_fields),
    }
    return OpenRequest(prompt=prompt, sampling=sampling, **(defaults | open_fields))


class ObservedTarget(Target):
    """A copy of a loaded target that counts its forwards and can be held before the next one.

    Attributes:
        forwards: number of forwards that sampled tokens.
        reached: set when a forward is held.
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

    def run(
        self,
        pool: KVCachePool,
        segments: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        meanwhile()
        if not self._released.is_set():
            self.reached.set()
            self._released.wait(TIMEOUT_SECONDS)
        self.forwards += any(segment.sampling for segment in segments)
        return super().run(pool, segments)


class ClientSession:
    """An open session and its text, as the client knows it."""

    def __init__(self, client: ProtocolClient, reply: OpenReply, request: OpenRequest) -> None:
        self._client = client
        self.id = reply.session
        self.reply = reply
        self.number = 0
        self.ids = list(request.prompt)
        self.apply_frame(request.first, reply.first)

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.id}/rounds"

    def next_round(self, **changes: Any) -> RoundRequest:
        """The next round, valid except for `changes`."""
        fields = {"v": messages.PROTOCOL_VERSION, "round": self.number + 1, "position": len(self.ids)}
        return RoundRequest(**(fields | changes))

    def run_round(self, **changes: Any) -> Frame:
        """Send the next round and apply its reply."""
        request = self.next_round(**changes)
        self.apply_frame(request, self._client.decode_reply(self._client.post(self.path, request), Frame))
        return self.frame

    def apply_frame(self, request: RoundRequest, frame: Frame) -> None:
        """Extend the text by the verifier's reply to `request`."""
        self.frame, self.number = frame, request.round
        self.ids += request.draft[: frame.accepted] + frame.tokens


class ProtocolClient:
    """A client of one verifier, in one encoding."""

    def __init__(self, url: str, media_type: str = messages.MSGPACK, token: str = "", **options: Any) -> None:
        self.media_type = media_type
        headers = {"content-type": media_type} | ({"authorization": f"Bearer {token}"} if token else {})
        self.http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS, **options)

    def __enter__(self) -> ProtocolClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, path: str, body: Message | bytes) -> httpx.Response:
        """Send a message, or arbitrary bytes."""
        content = body if isinstance(body, bytes) else messages.encode(body, self.media_type, session_id_of_path(path))
        return self.http.post(path, content=content)

    def decode_reply(self, response: httpx.Response, kind: type[M]) -> M:
        """The message of a successful response."""
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == self.media_type
        session = session_id_of_path(response.request.url.path)
        return messages.decode(response.content, kind, self.media_type, session)

    def expect_error(self, response: httpx.Response, status: int, code: str) -> ErrorReply:
        """The error reply of a response, which must have this status and code, and a sentence for people."""
        reply = decode_error(response)
        assert (response.status_code, reply.code) == (status, code)
        assert len(reply.message.split()) > 3
        return reply

    def open(self, prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, **changes: Any) -> ClientSession:
        """Open a session; see `opening`."""
        request = opening(prompt, sampling, **changes)
        return ClientSession(self, self.decode_reply(self.post("/v1/sessions", request), OpenReply), request)


def session_id_of_path(path: str) -> str:
    """The session id in the path of a round; empty for other paths."""
    parts = path.split("/")
    return parts[3] if path.endswith("/rounds") else ""


def decode_error(response: httpx.Response) -> ErrorReply:
    """The body of an error response, in the encoding that its header names."""
    return messages.decode(response.content, ErrorReply, response.headers["content-type"])
