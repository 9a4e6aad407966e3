"""Requests begin in turns, are bounded in number, and an answer that nobody reads stays small."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.common import request_gate
from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.common.request_gate import BEGUN_PER_TURN, PIECE_BYTES, TURN_SECONDS, RequestGate, in_pieces

ATTACKER, OTHER = "192.0.2.66", "192.0.2.1"
LARGE_BODY = bytes(range(256)) * 4096


class Application:
    """An ASGI application whose requests stay until they are released.

    Attributes:
        begun: address and path of each request, and the turn of the event loop in which it began.
        statuses: of the answers that were sent, in order.
    """

    def __init__(self, limit: int) -> None:
        self.gate = RequestGate(self, limit)
        self.begun: list[tuple[str, str, int]] = []
        self.statuses: list[int] = []
        self.released = asyncio.Event()
        self.turn = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append((scope["client"][0], scope["path"], self.turn))
        await self.released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def request(self, address: str, path: str = "/") -> asyncio.Task[None]:
        async def send(message: Any) -> None:
            self.statuses.extend([message["status"]] if "status" in message else [])

        scope = {"type": "http", "path": path, "client": (address, 1000 + len(self.begun))}
        return asyncio.create_task(self.gate(scope, lambda: None, send))  # type: ignore[arg-type]

    async def wait_until_begun(self, count: int) -> None:
        while len(self.begun) < count:  # noqa: ASYNC110 - each pause is one turn
            await asyncio.sleep(0)

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


async def test_requests_begin_in_turns_of_their_clients_and_health_before_all() -> None:
    app = Application(1000)
    counting = asyncio.create_task(app.count_turns())
    tasks = [app.request(ATTACKER, f"/{number}") for number in range(100)]
    tasks += [app.request(ATTACKER, "/healthz") for _ in range(100)]
    tasks += [app.request(OTHER, "/"), app.request(OTHER, "/healthz")]
    await app.wait_until_begun(len(tasks))
    app.released.set()
    await asyncio.gather(*tasks)
    counting.cancel()
    begun = [(address, path) for address, path, _ in app.begun]
    # What the attacker sent before was there first, but for the others' turn.
    assert begun.index((OTHER, "/")) <= 2 * BEGUN_PER_TURN + 2
    assert begun.index((OTHER, "/healthz")) <= 2 * BEGUN_PER_TURN + 2
    assert [path for _, path in begun if path[1:].isdigit()] == [f"/{number}" for number in range(100)]
    turns = [turn for _, _, turn in app.begun]
    assert max(map(turns.count, set(turns))) <= 2 * BEGUN_PER_TURN
    assert app.statuses == [200] * len(tasks)


@pytest.mark.parametrize(("size", "paced"), [(PIECE_BYTES, True), (PIECE_BYTES - 1, False)])
async def test_requests_with_long_bodies_read_on_in_turns(size: int, paced: bool) -> None:
    turn, read_in = 0, Counter[int]()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def read(scope: Any, receive: Any, send: Any) -> None:
        arrived.release()
        await all_begun.wait()
        for _ in range(3):
            assert len((await receive())["body"]) == size
            read_in[turn] += 1

    async def receive() -> Any:
        return {"type": "http.request", "body": bytes(size), "more_body": True}

    arrived, all_begun, gate = asyncio.Semaphore(0), asyncio.Event(), RequestGate(read, 1000)
    counting = asyncio.create_task(count_turns())
    scope = {"type": "http", "path": "/", "client": (ATTACKER, 1)}
    tasks = [asyncio.create_task(gate(scope, receive, None)) for _ in range(100)]  # type: ignore[arg-type]
    for _ in tasks:
        await arrived.acquire()
    all_begun.set()
    await asyncio.gather(*tasks)
    counting.cancel()
    assert sum(read_in.values()) == 300
    assert (max(read_in.values()) <= BEGUN_PER_TURN) == paced


async def test_fewer_requests_begin_in_a_turn_if_they_take_long() -> None:
    class Busy(Application):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            until = time.thread_time() + 1.2 * TURN_SECONDS
            while time.thread_time() < until:
                pass
            await super().__call__(scope, receive, send)

    app = Busy(1000)
    app.released.set()
    counting = asyncio.create_task(app.count_turns())
    await asyncio.gather(*(app.request(ATTACKER) for _ in range(30)))
    counting.cancel()
    turns = [turn for _, _, turn in app.begun]
    assert max(map(turns.count, set(turns[2 * BEGUN_PER_TURN :]))) == 1


async def test_too_many_requests_are_refused_to_whoever_has_most() -> None:
    app = Application(8)
    tasks = [app.request(ATTACKER) for _ in range(8)]
    await app.wait_until_begun(8)
    await app.request(ATTACKER)
    assert app.statuses == [503]
    # Two clients share the places, and the second has none yet.
    tasks += [app.request(OTHER) for _ in range(4)]
    await app.request(ATTACKER)
    await app.request(OTHER)
    assert app.statuses == [503] * 3
    app.released.set()
    await asyncio.gather(*tasks)
    await app.request(ATTACKER)
    assert app.statuses == [503] * 3 + [200] * 13


async def test_a_client_without_requests_is_served_among_more_clients_than_places() -> None:
    app = Application(8)
    tasks = [app.request(f"192.0.2.{number}") for number in range(12)]
    await app.wait_until_begun(12)
    await app.request("192.0.2.3")
    assert app.statuses == [503]
    app.released.set()
    await asyncio.gather(*tasks)
    assert app.statuses == [503] + [200] * 12


async def test_clients_that_come_one_after_the_other_stay_within_twice_the_limit() -> None:
    app = Application(64)
    tasks = [app.request(f"192.0.2.{number}") for number in range(60) for _ in range(64)]
    await asyncio.wait(tasks, timeout=0.0)
    while len(app.begun) + len(app.statuses) < len(tasks):  # noqa: ASYNC110 - each pause is one turn
        await asyncio.sleep(0)
    assert 2 * 64 <= len(app.begun) < 2 * 64 + 60
    assert len({address for address, _, _ in app.begun}) == 60
    app.released.set()
    await asyncio.gather(*tasks)


async def test_requests_that_are_cancelled_while_they_wait_take_no_turn() -> None:
    app = Application(1000)
    tasks = [app.request(ATTACKER) for _ in range(3 * BEGUN_PER_TURN)]
    await asyncio.sleep(0)
    for task in tasks[BEGUN_PER_TURN:-1]:
        task.cancel()
    await app.wait_until_begun(BEGUN_PER_TURN + 1)
    app.released.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert app.statuses == [200] * (BEGUN_PER_TURN + 1)


@given(st.integers(0, 5 * PIECE_BYTES))
def test_a_body_is_sent_whole_in_pieces(size: int) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = LARGE_BODY[:size]
    asyncio.run(in_pieces(send)({"type": "http.response.body", "body": body, "more_body": False}))  # type: ignore[arg-type]
    assert b"".join(message["body"] for message in sent) == body
    assert [message["more_body"] for message in sent] == [True] * (len(sent) - 1) + [False]
    assert max(len(message["body"]) for message in sent) <= PIECE_BYTES


async def test_an_answer_that_nobody_reads_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over, pieces = 0, request_gate.in_pieces

    def counted(send: Any) -> Any:
        async def count(message: Any) -> None:
            nonlocal handed_over
            await send(message)
            handed_over += len(message.get("body", b""))

        return pieces(count)  # type: ignore[arg-type]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(b"content-length", b"%d" % len(LARGE_BODY))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": LARGE_BODY})

    monkeypatch.setattr(request_gate, "in_pieces", counted)
    server = HttpServer(app, ListenOptions(port=0))
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    try:
        client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        client.initiate_connection()
        client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.send_headers(
            1, [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "a")], end_stream=True
        )
        body, ended = b"", False
        while not ended:
            writer.write(client.data_to_send())
            for event in client.receive_data(await reader.read(1 << 16)):
                if isinstance(event, h2.events.ResponseReceived):
                    # The server has as much as it takes now.
                    before = -1
                    while before != handed_over:
                        before = handed_over
                        await asyncio.sleep(0.1)
                    assert 0 < handed_over <= 8 * PIECE_BYTES
                    client.increment_flow_control_window(len(LARGE_BODY))
                    client.increment_flow_control_window(len(LARGE_BODY), 1)
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                ended = ended or isinstance(event, h2.events.StreamEnded)
        assert body == LARGE_BODY
    finally:
        writer.close()
        await server.stop()
