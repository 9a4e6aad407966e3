"""Rounds sent ahead of the previous reply: executed if the expectation holds, void and free of charge if not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    MSGPACK,
    PROTOCOL_VERSION,
    ErrorCode,
    Frame,
    FrameSplitter,
    OpenReply,
    RoundRequest,
)
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ClientSession,
    ObservedTarget,
    ProtocolClient,
    decode_error,
    opening,
    running,
    session_id_of_path,
)
from tests.conftest import serving

ENDLESS = Sampling(ignore_eos=True)
LENGTH = 60


def other_token(token: int) -> int:
    return (token + 1) % 300


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait without a limit of its own: pytest's time limit applies."""
    while not condition():  # noqa: ASYNC110 - the condition becomes true in a server that sets no event of ours
        await asyncio.sleep(0.002)


def count_waiting_rounds() -> int:
    """Number of rounds that the verifier in this process has received and that wait for the round before them."""
    return sum(getattr(task.get_coro(), "__qualname__", "") == "RoundReply.wait_done" for task in asyncio.all_tasks())


def http_client(url: str, http2: bool) -> httpx.AsyncClient:
    headers = {"content-type": MSGPACK}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS, http1=not http2, http2=http2)


class Board:
    """A session of the tiny target over HTTP/1.1 or HTTP/2, whose target can be held before a forward."""

    def __init__(
        self, client: httpx.AsyncClient, http2: bool, target: ObservedTarget, session: str, truth: list[int]
    ) -> None:
        self._client = client
        self._http2 = http2
        self.target = target
        self.session = session
        self.truth = truth

    def round(self, number: int, known: int, draft: list[int], **changes: object) -> RoundRequest:
        """A round after the first `known` tokens of the target's text."""
        return RoundRequest(PROTOCOL_VERSION, number, len(PROMPT) + known, draft, **changes)

    async def post(self, request: RoundRequest) -> httpx.Response:
        return await self._client.post(
            f"/v1/sessions/{self.session}/rounds", content=messages.encode(request, MSGPACK, self.session)
        )

    @contextlib.asynccontextmanager
    async def another_connection(self) -> AsyncIterator[Board]:
        async with http_client(str(self._client.base_url), self._http2) as client:
            yield Board(client, self._http2, self.target, self.session, self.truth)

    async def delete(self) -> None:
        await self._client.delete(f"/v1/sessions/{self.session}")

    async def send_pipelined(self, *requests: RoundRequest) -> list[asyncio.Task[httpx.Response]]:
        """Send the first round, and the others once it is held before its forward; return when all have arrived."""
        self.target.hold()
        tasks = [asyncio.create_task(self.post(requests[0]))]
        await wait_until(self.target.reached.is_set)
        tasks += [asyncio.create_task(self.post(request)) for request in requests[1:]]
        await wait_until(lambda: count_waiting_rounds() == len(requests) - 1)
        assert not any(task.done() for task in tasks)
        return tasks


def decode_frame(response: httpx.Response) -> Frame:
    assert response.status_code == 200, decode_error(response)
    return messages.decode(response.content, Frame, MSGPACK, session_id_of_path(response.request.url.path))


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, decode_error(response).code


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
async def board(tiny: Target, reference_text: ReferenceText, request: pytest.FixtureRequest) -> AsyncIterator[Board]:
    """A session with one generated token; no forwards are counted yet."""
    target = ObservedTarget(tiny)
    async with serving(target) as server, http_client(server.url, request.param) as client:
        opened = await client.post("/v1/sessions", content=messages.encode(opening(sampling=ENDLESS), MSGPACK))
        reply = messages.decode(opened.content, OpenReply, MSGPACK)
        target.forwards = 0
        try:
            yield Board(client, request.param, target, reply.session, reference_text(PROMPT, LENGTH, ENDLESS))
        finally:
            target.release()


async def test_a_round_with_a_right_expectation_is_executed_in_its_turn(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.send_pipelined(
        board.round(1, 1, truth[1:4]), board.round(2, 5, truth[5:8], expects=[truth[4]])
    )
    board.target.release()
    assert decode_frame(await now).tokens == truth[4:5]
    frame = decode_frame(await ahead)
    assert (frame.round, frame.accepted, frame.tokens) == (2, 3, truth[8:9])
    assert board.target.forwards == 2
    following = decode_frame(await board.post(board.round(3, 9, truth[9:11], n=2)))
    assert (following.accepted, following.tokens) == (2, truth[11:13])


async def test_a_round_sent_ahead_may_stream(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.send_pipelined(
        board.round(1, 1, truth[1:4]), board.round(2, 5, truth[5:8], expects=[truth[4]], n=20, stream=True)
    )
    board.target.release()
    await now
    response = await ahead
    assert response.headers["content-type"] == messages.STREAM_MEDIA_TYPES[MSGPACK]
    frames = [
        messages.decode(body, Frame, MSGPACK, board.session) for body in FrameSplitter(MSGPACK).feed(response.content)
    ]
    assert [token for frame in frames for token in frame.tokens] == truth[8:28]


WRONG_EXPECTATIONS = {
    "another token": (3, 5, lambda truth: other_token(truth[4]), {}),
    "a shorter acceptance": (1, 5, lambda truth: truth[4], {}),
    "nothing accepted": (0, 5, lambda truth: truth[4], {}),
    "more tokens": (3, 5, lambda truth: truth[4], {"n": 2}),
    "too far by one": (3, 6, lambda truth: truth[4], {}),
    "an id outside the vocabulary": (3, 5, lambda truth: 2**31 - 1, {}),
}


@pytest.mark.parametrize("expectation", WRONG_EXPECTATIONS.values(), ids=WRONG_EXPECTATIONS.keys())
async def test_a_wrong_expectation_makes_the_round_void_without_a_forward(board: Board, expectation: tuple) -> None:
    right, known, token, changes = expectation
    truth = board.truth
    draft = [t if index < right else other_token(t) for index, t in enumerate(truth[1:4])]
    now, ahead = await board.send_pipelined(
        board.round(1, 1, draft, **changes), board.round(2, known, truth[known:8], expects=[token(truth)])
    )
    board.target.release()
    frame = decode_frame(await now)
    assert frame.accepted == right
    forwards = board.target.forwards
    response = await ahead
    assert error_of(response) == (409, ErrorCode.ROUND_VOID)
    assert "was sent ahead of another text" in decode_error(response).message
    assert board.target.forwards == forwards == changes.get("n", 1)
    # The right round has the same number, whether or not it is sent ahead.
    known = 1 + frame.accepted + len(frame.tokens)
    real = decode_frame(await board.post(board.round(2, known, truth[known : known + 2])))
    assert (real.round, real.accepted, real.tokens) == (2, 2, truth[known + 2 : known + 3])
    # The wrong round, if it arrives late, is still void and not a conflict.
    assert error_of(await board.post(board.round(2, 8, [7], expects=[truth[7]]))) == (409, ErrorCode.ROUND_VOID)
    late = board.round(2, known, [7], expects=[other_token(truth[known - 1])])
    assert error_of(await board.post(late)) == (409, ErrorCode.ROUND_VOID)


async def test_an_expectation_may_come_true_through_a_sibling(board: Board) -> None:
    """The last draft token is rejected, its sibling matches, and the bonus token is the one that was expected."""
    truth = board.truth
    now, ahead = await board.send_pipelined(
        board.round(1, 1, [*truth[1:3], other_token(truth[3])], siblings={2: [truth[3]]}),
        board.round(2, 5, truth[5:8], expects=[truth[4]]),
    )
    board.target.release()
    assert (decode_frame(await now).accepted, decode_frame(await now).tokens) == (2, truth[3:5])
    assert (decode_frame(await ahead).accepted, decode_frame(await ahead).tokens) == (3, truth[8:9])


async def test_repeated_rounds_get_the_recorded_reply(board: Board) -> None:
    truth = board.truth
    first = board.round(1, 1, truth[1:4])
    second = board.round(2, 5, truth[5:8], expects=[truth[4]])
    now, *ahead = await board.send_pipelined(first, second, second, second)
    board.target.release()
    await now
    replies = [decode_frame(await task) for task in ahead]
    replies += [decode_frame(await board.post(second))]
    replies += [decode_frame(await board.post(msgspec.structs.replace(second, expects=[])))]
    assert replies == [replies[0]] * 5
    assert replies[0].tokens == truth[8:9]
    assert board.target.forwards == 2
    assert error_of(await board.post(msgspec.structs.replace(second, n=2))) == (409, ErrorCode.ROUND_CONFLICT)
    void = msgspec.structs.replace(second, expects=[other_token(truth[4])])
    assert error_of(await board.post(void)) == (409, ErrorCode.ROUND_VOID)


async def test_of_two_different_rounds_sent_ahead_one_is_executed(board: Board) -> None:
    truth = board.truth
    now, *ahead = await board.send_pipelined(
        board.round(1, 1, truth[1:4]),
        board.round(2, 5, [], expects=[other_token(truth[4])]),
        board.round(2, 5, truth[5:8], expects=[truth[4]]),
        board.round(2, 5, truth[5:7], expects=[truth[4]]),
    )
    board.target.release()
    await now
    responses = [await task for task in ahead]
    assert error_of(responses[0]) == (409, ErrorCode.ROUND_VOID)
    codes = sorted("" if response.status_code == 200 else decode_error(response).code for response in responses[1:])
    assert codes == ["", ErrorCode.ROUND_CONFLICT]
    assert board.target.forwards == 2


async def test_a_client_that_disconnects_while_waiting_has_sent_nothing(board: Board) -> None:
    truth = board.truth
    [now] = await board.send_pipelined(board.round(1, 1, truth[1:4]))
    # On a separate connection: httpx does not reset a single HTTP/2 stream when a request is cancelled.
    async with board.another_connection() as other:
        ahead = asyncio.create_task(other.post(board.round(2, 5, truth[5:8], expects=[truth[4]])))
        await wait_until(lambda: count_waiting_rounds() == 1)
        ahead.cancel()
        await asyncio.wait({ahead})
    await wait_until(lambda: count_waiting_rounds() == 0)
    board.target.release()
    await now
    frame = decode_frame(await board.post(board.round(2, 5, [other_token(truth[5])])))
    assert (frame.accepted, frame.tokens) == (0, truth[5:6])
    assert board.target.forwards == 2


async def test_closing_the_session_fails_pipelined_rounds(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.send_pipelined(
        board.round(1, 1, truth[1:4]), board.round(2, 5, truth[5:8], expects=[truth[4]])
    )
    await board.delete()
    assert error_of(await ahead) == (404, ErrorCode.SESSION_LOST)
    assert error_of(await now) == (404, ErrorCode.SESSION_LOST)
    board.target.release()
    assert error_of(await board.post(board.round(2, 5, [], expects=[truth[4]]))) == (404, ErrorCode.SESSION_LOST)


async def test_only_one_round_ahead_and_only_with_an_expectation(board: Board) -> None:
    truth = board.truth
    [now] = await board.send_pipelined(board.round(1, 1, truth[1:4]))
    for early in (board.round(2, 5, truth[5:8]), board.round(3, 9, truth[9:12], expects=[truth[8]])):
        response = await board.post(early)
        assert error_of(response) == (409, ErrorCode.ROUND_OUT_OF_ORDER)
        assert decode_error(response).detail == {"expected": 1}
    board.target.release()
    await now


async def test_other_errors_of_a_round_sent_ahead_are_reported(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.send_pipelined(board.round(1, 1, []), board.round(2, 2, [300], expects=[truth[1]]))
    board.target.release()
    await now
    assert error_of(await ahead) == (400, ErrorCode.INVALID_TOKEN)
    assert decode_frame(await board.post(board.round(2, 2, truth[2:4]))).accepted == 2


async def test_the_end_of_the_text_voids_a_round_sent_ahead(tiny: Target, reference_text: ReferenceText) -> None:
    prompt = [(11 * index) % 299 + 1 for index in range(510)]
    truth = reference_text(prompt, 2, ENDLESS)
    target = ObservedTarget(tiny)
    async with serving(target) as server, http_client(server.url, False) as client:
        opened = await client.post("/v1/sessions", content=messages.encode(opening(prompt, ENDLESS), MSGPACK))
        board = Board(client, False, target, messages.decode(opened.content, OpenReply, MSGPACK).session, truth)
        last = RoundRequest(PROTOCOL_VERSION, 1, 511)
        now, ahead = await board.send_pipelined(last, RoundRequest(PROTOCOL_VERSION, 2, 512, expects=truth[1:]))
        target.release()
        assert decode_frame(await now).finish == "length"
        assert error_of(await ahead) == (409, ErrorCode.ROUND_VOID)
        assert "has ended" in decode_error(await ahead).message
        assert target.forwards == 2
        assert error_of(await board.post(RoundRequest(PROTOCOL_VERSION, 2, 512))) == (409, ErrorCode.SESSION_FINISHED)
        assert decode_frame(await board.post(msgspec.structs.replace(last, expects=truth[:1]))) == decode_frame(
            await now
        )


def test_an_opening_may_expect_only_the_last_prompt_token(client: ProtocolClient) -> None:
    assert client.open(expects=PROMPT[-1:]).frame.tokens == client.open().frame.tokens
    client.expect_error(client.post("/v1/sessions", opening(expects=[1])), 409, ErrorCode.ROUND_VOID)


class PipelinedBoard:
    """A session whose board sends each round together with the one after it."""

    def __init__(
        self, client: ProtocolClient, target: ObservedTarget, session: ClientSession, truth: list[int]
    ) -> None:
        self._client = client
        self._target = target
        self._session = session
        self._truth = truth

    def run_two_rounds(self, width: int, accepted: int, expectation_holds: bool, next_width: int) -> None:
        """Send a round of `width` draft tokens, wrong from index `accepted` on, and one ahead of its reply."""
        session, truth = self._session, self._truth[len(self._session.ids) - len(PROMPT) :]
        draft = [t if index < accepted else other_token(t) for index, t in enumerate(truth[:width])]
        expected = truth[width] if expectation_holds else other_token(truth[width])
        first = session.next_round(draft=draft)
        ahead = session.next_round(
            round=first.round + 1,
            position=first.position + width + 1,
            draft=truth[width + 1 : width + 1 + next_width],
            expects=[expected],
        )
        self._target.hold()
        self._target.forwards = 0
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(self._client.post, session.path, first)
            self._target.reached.wait(TIMEOUT_SECONDS)
            two = pool.submit(self._client.post, session.path, ahead)
            self._target.release()
        session.apply_frame(first, self._client.decode_reply(one.result(), Frame))
        assert session.ids[-1] == truth[min(accepted, width)]
        if expectation_holds and accepted >= width:
            session.apply_frame(ahead, self._client.decode_reply(two.result(), Frame))
            assert session.frame.accepted == next_width
            assert self._target.forwards == 2
        else:
            self._client.expect_error(two.result(), 409, ErrorCode.ROUND_VOID)
            assert self._target.forwards == 1


@pytest.fixture(scope="module")
def observed(tiny: Target) -> Iterator[tuple[ProtocolClient, ObservedTarget]]:
    target = ObservedTarget(tiny)
    with running(target) as url, ProtocolClient(url) as client:
        yield client, target


steps = st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(0, 5))


@pytest.mark.slow
@given(st.lists(steps, min_size=1, max_size=4), st.sampled_from([ENDLESS, Sampling(1.0, seed=9, ignore_eos=True)]))
@settings(max_examples=40)
def test_the_text_does_not_depend_on_expectations(
    observed: tuple[ProtocolClient, ObservedTarget],
    reference_text: ReferenceText,
    rounds: list[tuple[int, int, bool, int]],
    sampling: Sampling,
) -> None:
    client, target = observed
    truth = reference_text(PROMPT, LENGTH, sampling)
    session = client.open(sampling=sampling)
    for width, accepted, expectation_holds, next_width in rounds:
        PipelinedBoard(client, target, session, truth).run_two_rounds(width, accepted, expectation_holds, next_width)
    session.run_round(n=3)
    assert session.ids == PROMPT + truth[: len(session.ids) - len(PROMPT)]
