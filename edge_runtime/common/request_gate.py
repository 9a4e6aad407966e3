"""Bounds on the requests to a server: how many are in progress, and how many begin or read on at a time.

The HTTP server starts every request that it has read at once. When a client sends thousands over HTTP/2, each takes the
event loop for a moment, and all other requests would wait for the last of them; each also keeps its headers in memory,
and its answer until the client reads it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING

from edge_runtime.common.connections import DEFAULT_SHARED, LOG_SECONDS, client_group

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

# Probes of health, which wait for no other requests than other probes.
HEALTH_PATHS = frozenset(("/healthz", "/health"))
# Requests that begin in one turn of the event loop. Chosen: each takes 0.2 to 0.5 ms until it waits for something. If
# they take more (a large body takes up to 20 ms), fewer begin, so that a turn takes this long at most, in processor
# time: a probe of health takes four turns, an answer some hundred. With 10 ms, and 200 prompts of 200 KB at once, the
# answers of others took a fifth longer.
BEGUN_PER_TURN = 8
TURN_SECONDS = 0.002
# Bytes of a piece in which a longer answer is handed to the HTTP server, which takes five pieces before the client
# reads the first: an unread answer takes little memory. Chosen.
PIECE_BYTES = 1 << 13


class RequestGate:
    """An ASGI application around another one that bounds its requests.

    At most `BEGUN_PER_TURN` requests, and as many probes of health, begin in a turn of the event loop, or go on with a
    further piece of a long body; clients take turns. Once `limit` requests are in progress, a client that has its share
    of them is refused more (503).
    """

    def __init__(self, app: ASGIApp, limit: int, shared: tuple[str, ...] = DEFAULT_SHARED) -> None:
        """
        Args:
            limit: requests in progress at once.
            shared: networks each of whose connections counts as a client, see `ConnectionLimits`.
        """
        self._app = app
        self._limit = limit
        self._shared = shared
        self._probes, self._others = ClientTurns(), ClientTurns()
        self._serving = False
        # How many may begin in this turn, and the processor time of this thread when the last turn ended.
        self._pace, self._served = BEGUN_PER_TURN, 0.0
        # Requests in progress by client.
        self._held: Counter[str] = Counter()
        self._total = 0
        self._logged = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = scope.get("client")
        client = client_group((address[0], int(address[1])), self._shared) if address else ""
        if self._total >= self._limit and self._held[client] >= self._share():
            await self._refuse(send)
            return
        self._held[client] += 1
        self._total += 1
        try:
            turns = self._probes if scope["path"] in HEALTH_PATHS else self._others
            await self._wait(turns, client)
            await self._app(scope, self._paced(receive, turns, client), in_pieces(send))
        finally:
            self._total -= 1
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

    def _share(self) -> int:
        """How many requests a client may have now that `limit` are in progress."""
        # The shares of clients that come one after the other would add up to several times the limit.
        return max(1, self._limit // len(self._held)) if self._total < 2 * self._limit else 1

    async def _wait(self, turns: ClientTurns, client: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns.add(client, turn)
        if not self._serving:
            self._serve()
        await turn

    def _paced(self, receive: Receive, turns: ClientTurns, client: str) -> Receive:
        """Return a `receive` after which a request with a piece of a long body waits for its turn to go on."""

        async def receive_paced() -> Message:
            message = await receive()
            if len(message.get("body", b"")) >= PIECE_BYTES:
                await self._wait(turns, client)
            return message

        return receive_paced

    def _serve(self) -> None:
        """Let the next requests begin, or go on; those after them in the next turn of the event loop."""
        now = time.thread_time()
        if self._serving:
            excess = (now - self._served) / TURN_SECONDS
            self._pace = max(1, min(BEGUN_PER_TURN, int(self._pace / excess) if excess > 1 else self._pace + 1))
        self._served = now
        begun = sum(turns.begin(self._pace) for turns in (self._probes, self._others))
        self._serving = begun > 0
        if begun:
            asyncio.get_running_loop().call_soon(self._serve)

    async def _refuse(self, send: Send) -> None:
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.warning(
                "%d requests are in progress: further ones are refused to the client that has most of them", self._total
            )
        headers = [(b"content-type", b"text/plain"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"too many requests are in progress; try again\n"})


class ClientTurns:
    """Requests that wait for their beginning. Clients take turns."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def add(self, client: str, turn: asyncio.Future[None]) -> None:
        self._waiting.setdefault(client, deque()).append(turn)

    def begin(self, count: int) -> int:
        """Let up to `count` requests begin; return how many did."""
        begun = 0
        while begun < count and self._waiting:
            client, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[client] = queue
            # It is cancelled when the server stops.
            if not turn.done():
                turn.set_result(None)
                begun += 1
        return begun


def in_pieces(send: Send) -> Send:
    """Return a `send` that passes long bodies on in pieces, each when the server has room for it."""

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        last = max(0, len(body) - 1) // PIECE_BYTES * PIECE_BYTES
        for start in range(0, last, PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if last:
            message = {**message, "body": body[last:]}
        await send(message)

    return send_pieces
