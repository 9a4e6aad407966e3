"""Rounds that are sent before the last one is answered: played if the guess was right, void and free if not."""

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
    ObservedTarget,
    ProtocolClient,
    Session,
    decode_error,
    opening,
    running,
    session_id_of_path,
)
from tests.conftest import serving

ENDLESS = Sampling(ignore_eos=True)
LENGTH = 60


def wrong(token: int) -> int:
    return (token + 1) % 300


async def until(true: Callable[[], bool]) -> None:
    """Returns once `true()` is; the test's own time limit is what bounds the wait."""
    while not true():  # noqa: ASYNC110 - what is waited for happens in a server that sets no event of ours
        await asyncio.sleep(0.002)


def waiting_rounds() -> int:
    """Rounds that this process's verifier has received and not judged, since the round before them still runs."""
    return sum(getattr(task.get_coro(), "__qualname__", "") == "RoundReply.wait_done" for task in asyncio.all_tasks())


def client_of(url: str, http2: bool) -> httpx.AsyncClient:
    headers = {"content-type": MSGPACK}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=20, http1=not http2, http2=http2)


class Board:
    """A session of the tiny target, held up before its first forward behind the opening, over either HTTP."""

    def __init__(
        self, client: httpx.AsyncClient, http2: bool, target: ObservedTarget, session: str, truth: list[int]
    ) -> None:
        self._client = client
        self._http2 = http2
        self.target = target
        self.session = session
        self.truth = truth

    def round(self, number: int, known: int, draft: list[int], **changes: object) -> RoundRequest:
        """A round behind the first `known` tokens of the target's text."""
        return RoundRequest(PROTOCOL_VERSION, number, len(PROMPT) + known, draft, **changes)

    async def post(self, request: RoundRequest) -> httpx.Response:
        return await self._client.post(
            f"/v1/sessions/{self.session}/rounds", content=messages.encode(request, MSGPACK, self.session)
        )

    @contextlib.asynccontextmanager
    async def another_connection(self) -> AsyncIterator[Board]:
        async with client_of(str(self._client.base_url), self._http2) as client:
            yield Board(client, self._http2, self.target, self.session, self.truth)

    async def delete(self) -> None:
        await self._client.delete(f"/v1/sessions/{self.session}")

    async def in_flight(self, *requests: RoundRequest) -> list[asyncio.Task[httpx.Response]]:
        """Sends the first, and the others when that one is about to be played; all of them are under way then."""
        self.target.hold()
        tasks = [asyncio.create_task(self.post(requests[0]))]
        await until(self.target.reached.is_set)
        tasks += [asyncio.create_task(self.post(request)) for request in requests[1:]]
        await until(lambda: waiting_rounds() == len(requests) - 1)
        assert not any(task.done() for task in tasks)
        return tasks


def frame_of(response: httpx.Response) -> Frame:
    assert response.status_code == 200, decode_error(response)
    return messages.decode(response.content, Frame, MSGPACK, session_id_of_path(response.request.url.path))


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, decode_error(response).code


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
async def board(tiny: Target, reference_text: ReferenceText, request: pytest.FixtureRequest) -> AsyncIterator[Board]:
    """One token of the text is known; no forward is counted yet."""
    target = ObservedTarget(tiny)
    async with serving(target) as server, client_of(server.url, request.param) as client:
        opened = await client.post("/v1/sessions", content=messages.encode(opening(sampling=ENDLESS), MSGPACK))
        reply = messages.decode(opened.content, OpenReply, MSGPACK)
        target.forwards = 0
        try:
            yield Board(client, request.param, target, reply.session, reference_text(PROMPT, LENGTH, ENDLESS))
        finally:
            target.release()


async def test_a_right_guess_is_played_when_its_turn_comes(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.in_flight(board.round(1, 1, truth[1:4]), board.round(2, 5, truth[5:8], expects=[truth[4]]))
    board.target.release()
    assert frame_of(await now).tokens == truth[4:5]
    frame = frame_of(await ahead)
    assert (frame.round, frame.accepted, frame.tokens) == (2, 3, truth[8:9])
    assert board.target.forwards == 2
    following = frame_of(await board.post(board.round(3, 9, truth[9:11], n=2)))
    assert (following.accepted, following.tokens) == (2, truth[11:13])


async def test_a_round_that_was_sent_ahead_may_stream(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.in_flight(
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


WRONG_GUESSES = {
    "another token": (3, 5, lambda truth: wrong(truth[4]), {}),
    "a shorter acceptance": (1, 5, lambda truth: truth[4], {}),
    "nothing accepted": (0, 5, lambda truth: truth[4], {}),
    "more tokens": (3, 5, lambda truth: truth[4], {"n": 2}),
    "too far by one": (3, 6, lambda truth: truth[4], {}),
    "an id that is none": (3, 5, lambda truth: 2**31 - 1, {}),
}


@pytest.mark.parametrize("guess", WRONG_GUESSES.values(), ids=WRONG_GUESSES.keys())
async def test_a_wrong_guess_is_void_costs_no_forward_and_leaves_no_trace(board: Board, guess: tuple) -> None:
    right, known, token, changes = guess
    truth = board.truth
    draft = [t if index < right else wrong(t) for index, t in enumerate(truth[1:4])]
    now, ahead = await board.in_flight(
        board.round(1, 1, draft, **changes), board.round(2, known, truth[known:8], expects=[token(truth)])
    )
    board.target.release()
    frame = frame_of(await now)
    assert frame.accepted == right
    forwards = board.target.forwards
    response = await ahead
    assert code_of(response) == (409, ErrorCode.ROUND_VOID)
    assert "was sent ahead of another text" in decode_error(response).message
    assert board.target.forwards == forwards == changes.get("n", 1)
    # The round that is right has the same number; whether it is sent ahead or not is all the same.
    known = 1 + frame.accepted + len(frame.tokens)
    real = frame_of(await board.post(board.round(2, known, truth[known : known + 2])))
    assert (real.round, real.accepted, real.tokens) == (2, 2, truth[known + 2 : known + 3])
    # The wrong one, should it come late, is void still, and no conflict.
    assert code_of(await board.post(board.round(2, 8, [7], expects=[truth[7]]))) == (409, ErrorCode.ROUND_VOID)
    late = board.round(2, known, [7], expects=[wrong(truth[known - 1])])
    assert code_of(await board.post(late)) == (409, ErrorCode.ROUND_VOID)


async def test_a_text_that_came_about_otherwise_is_right_too(board: Board) -> None:
    """The last draft token fails, its sibling does not, and what follows it is what was expected behind the draft."""
    truth = board.truth
    now, ahead = await board.in_flight(
        board.round(1, 1, [*truth[1:3], wrong(truth[3])], siblings={2: [truth[3]]}),
        board.round(2, 5, truth[5:8], expects=[truth[4]]),
    )
    board.target.release()
    assert (frame_of(await now).accepted, frame_of(await now).tokens) == (2, truth[3:5])
    assert (frame_of(await ahead).accepted, frame_of(await ahead).tokens) == (3, truth[8:9])


async def test_repeated_rounds_get_the_recorded_answer(board: Board) -> None:
    truth = board.truth
    first = board.round(1, 1, truth[1:4])
    second = board.round(2, 5, truth[5:8], expects=[truth[4]])
    now, *ahead = await board.in_flight(first, second, second, second)
    board.target.release()
    await now
    answers = [frame_of(await task) for task in ahead]
    answers += [frame_of(await board.post(second))]
    answers += [frame_of(await board.post(msgspec.structs.replace(second, expects=[])))]
    assert answers == [answers[0]] * 5
    assert answers[0].tokens == truth[8:9]
    assert board.target.forwards == 2
    assert code_of(await board.post(msgspec.structs.replace(second, n=2))) == (409, ErrorCode.ROUND_CONFLICT)
    void = msgspec.structs.replace(second, expects=[wrong(truth[4])])
    assert code_of(await board.post(void)) == (409, ErrorCode.ROUND_VOID)


async def test_of_two_different_rounds_sent_ahead_one_is_played(board: Board) -> None:
    truth = board.truth
    now, *ahead = await board.in_flight(
        board.round(1, 1, truth[1:4]),
        board.round(2, 5, [], expects=[wrong(truth[4])]),
        board.round(2, 5, truth[5:8], expects=[truth[4]]),
        board.round(2, 5, truth[5:7], expects=[truth[4]]),
    )
    board.target.release()
    await now
    responses = [await task for task in ahead]
    assert code_of(responses[0]) == (409, ErrorCode.ROUND_VOID)
    codes = sorted("" if response.status_code == 200 else decode_error(response).code for response in responses[1:])
    assert codes == ["", ErrorCode.ROUND_CONFLICT]
    assert board.target.forwards == 2


async def test_a_client_that_hangs_up_while_waiting_has_sent_nothing(board: Board) -> None:
    truth = board.truth
    [now] = await board.in_flight(board.round(1, 1, truth[1:4]))
    # Over a connection of its own: httpx resets no single HTTP/2 stream when a request is cancelled.
    async with board.another_connection() as other:
        ahead = asyncio.create_task(other.post(board.round(2, 5, truth[5:8], expects=[truth[4]])))
        await until(lambda: waiting_rounds() == 1)
        ahead.cancel()
        await asyncio.wait({ahead})
    await until(lambda: waiting_rounds() == 0)
    board.target.release()
    await now
    frame = frame_of(await board.post(board.round(2, 5, [wrong(truth[5])])))
    assert (frame.accepted, frame.tokens) == (0, truth[5:6])
    assert board.target.forwards == 2


async def test_a_session_that_is_closed_meanwhile_is_lost(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.in_flight(board.round(1, 1, truth[1:4]), board.round(2, 5, truth[5:8], expects=[truth[4]]))
    await board.delete()
    assert code_of(await ahead) == (404, ErrorCode.SESSION_LOST)
    assert code_of(await now) == (404, ErrorCode.SESSION_LOST)
    board.target.release()
    assert code_of(await board.post(board.round(2, 5, [], expects=[truth[4]]))) == (404, ErrorCode.SESSION_LOST)


async def test_only_one_step_ahead_and_only_by_who_says_so(board: Board) -> None:
    truth = board.truth
    [now] = await board.in_flight(board.round(1, 1, truth[1:4]))
    for early in (
        board.round(2, 5, truth[5:8]),
        board.round(3, 9, truth[9:12], expects=[truth[8]]),
    ):
        response = await board.post(early)
        assert code_of(response) == (409, ErrorCode.ROUND_OUT_OF_ORDER)
        assert decode_error(response).detail == {"expected": 1}
    board.target.release()
    await now


async def test_a_round_that_is_wrong_otherwise_is_refused_as_ever(board: Board) -> None:
    truth = board.truth
    now, ahead = await board.in_flight(board.round(1, 1, []), board.round(2, 2, [300], expects=[truth[1]]))
    board.target.release()
    await now
    assert code_of(await ahead) == (400, ErrorCode.INVALID_TOKEN)
    assert frame_of(await board.post(board.round(2, 2, truth[2:4]))).accepted == 2


async def test_a_text_that_ends_voids_what_was_sent_ahead(tiny: Target, reference_text: ReferenceText) -> None:
    prompt = [(11 * index) % 299 + 1 for index in range(510)]
    truth = reference_text(prompt, 2, ENDLESS)
    target = ObservedTarget(tiny)
    async with serving(target) as server, client_of(server.url, False) as client:
        opened = await client.post("/v1/sessions", content=messages.encode(opening(prompt, ENDLESS), MSGPACK))
        board = Board(client, False, target, messages.decode(opened.content, OpenReply, MSGPACK).session, truth)
        last = RoundRequest(PROTOCOL_VERSION, 1, 511)
        now, ahead = await board.in_flight(last, RoundRequest(PROTOCOL_VERSION, 2, 512, expects=truth[1:]))
        target.release()
        assert frame_of(await now).finish == "length"
        assert code_of(await ahead) == (409, ErrorCode.ROUND_VOID)
        assert "has ended" in decode_error(await ahead).message
        assert target.forwards == 2
        assert code_of(await board.post(RoundRequest(PROTOCOL_VERSION, 2, 512))) == (409, ErrorCode.SESSION_FINISHED)
        assert frame_of(await board.post(msgspec.structs.replace(last, expects=truth[:1]))) == frame_of(await now)


def test_an_opening_may_expect_only_how_its_own_prompt_ends(client: ProtocolClient) -> None:
    assert client.open(expects=PROMPT[-1:]).frame.tokens == client.open().frame.tokens
    client.expect_error(client.post("/v1/sessions", opening(expects=[1])), 409, ErrorCode.ROUND_VOID)


class Conversation:
    """A session whose board guesses: plays a round, and sends another before the first is answered."""

    def __init__(self, client: ProtocolClient, target: ObservedTarget, session: Session, truth: list[int]) -> None:
        self._client = client
        self._target = target
        self._session = session
        self._truth = truth

    def tell(self, width: int, slip: int, guess_is_right: bool, next_width: int) -> None:
        """One round of `width` draft tokens, wrong from `slip` on, and one ahead of its answer."""
        session, truth = self._session, self._truth[len(self._session.ids) - len(PROMPT) :]
        draft = [t if index < slip else wrong(t) for index, t in enumerate(truth[:width])]
        guess = truth[width] if guess_is_right else wrong(truth[width])
        first = session.next_round(draft=draft)
        ahead = session.next_round(
            round=first.round + 1,
            position=first.position + width + 1,
            draft=truth[width + 1 : width + 1 + next_width],
            expects=[guess],
        )
        self._target.hold()
        self._target.forwards = 0
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(self._client.post, session.path, first)
            self._target.reached.wait(20)
            two = pool.submit(self._client.post, session.path, ahead)
            self._target.release()
        session.apply_frame(first, self._client.decode_reply(one.result(), Frame))
        assert session.ids[-1] == truth[min(slip, width)]
        if guess_is_right and slip >= width:
            session.apply_frame(ahead, self._client.decode_reply(two.result(), Frame))
            assert session.frame.accepted == next_width
            assert self._target.forwards == 2
        else:
            self._client.expect_error(two.result(), 409, ErrorCode.ROUND_VOID)
            assert self._target.forwards == 1


@pytest.fixture(scope="module")
def watched(tiny: Target) -> Iterator[tuple[ProtocolClient, ObservedTarget]]:
    target = ObservedTarget(tiny)
    with running(target) as url, ProtocolClient(url) as client:
        yield client, target


steps = st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(0, 5))


@given(st.lists(steps, min_size=1, max_size=4), st.sampled_from([ENDLESS, Sampling(1.0, seed=9, ignore_eos=True)]))
@settings(max_examples=40, deadline=None)
def test_whatever_is_guessed_the_text_is_the_targets(
    watched: tuple[ProtocolClient, ObservedTarget],
    reference_text: ReferenceText,
    told: list[tuple[int, int, bool, int]],
    sampling: Sampling,
) -> None:
    client, target = watched
    truth = reference_text(PROMPT, LENGTH, sampling)
    session = client.open(sampling=sampling)
    for width, slip, guess_is_right, next_width in told:
        Conversation(client, target, session, truth).tell(width, slip, guess_is_right, next_width)
    session.run_round(n=3)
    assert session.ids == PROMPT + truth[: len(session.ids) - len(PROMPT)]
