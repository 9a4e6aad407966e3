"""Wire messages: round trips in both encodings, size budgets, and rejection of malformed input."""

from __future__ import annotations

import string
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.messages import (
    JSON,
    MSGPACK,
    PROTOCOL_VERSION,
    ErrorReply,
    Frame,
    FrameSplitter,
    Message,
    ModelCard,
    ModelList,
    OpenReply,
    OpenRequest,
    RoundRequest,
    TokenLogprobs,
)
from edge_runtime.protocol.sampling import Sampling

T = TypeVar("T")

ENCODINGS = [MSGPACK, JSON]
encodings = st.sampled_from(ENCODINGS)
ids = st.integers(0, 2**31 - 1)
id_lists = st.lists(ids, max_size=40)
counts = st.one_of(st.integers(0, 300), ids)
names = st.text(string.printable, max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)

rounds = st.builds(
    RoundRequest,
    v=st.just(PROTOCOL_VERSION),
    round=counts,
    position=counts,
    draft=id_lists,
    n=st.integers(1, 1 << 16),
    siblings=st.dictionaries(st.integers(0, 40), id_lists, max_size=4),
    stream=st.booleans(),
    expects=st.lists(ids, max_size=1),
)
samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(0.001, 100)),
    top_k=counts,
    top_p=st.floats(1e-6, 1),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.booleans(),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=4),
    min_tokens=counts,
    stop_ids=id_lists,
    grammar=names,
)
openings = st.builds(
    OpenRequest,
    v=st.just(PROTOCOL_VERSION),
    key=st.text(string.ascii_letters, min_size=8, max_size=64),
    prompt=st.lists(ids, min_size=1, max_size=40),
    first=rounds,
    sampling=samplings,
    model=names,
    vocabulary=names,
    draft=names,
    generated=counts,
    logprobs=st.integers(0, messages.MAX_LOGPROBS),
)
logprobs = st.integers(0, 9999 * messages.LOGPROB_UNITS).map(lambda units: -units / messages.LOGPROB_UNITS)
token_logprobs = st.builds(TokenLogprobs, logprob=logprobs, top=st.lists(st.tuples(ids, logprobs), max_size=21))
frames = st.builds(
    Frame,
    v=st.just(PROTOCOL_VERSION),
    round=counts,
    accepted=counts,
    tokens=id_lists,
    queue_100us=counts,
    forward_100us=counts,
    load=st.integers(0, 100),
    finish=st.sampled_from(["", "stop", "length"]),
    more=st.booleans(),
    close_calls=st.lists(st.tuples(counts, floats), max_size=3),
    prefill_100us=counts,
    further=counts,
    logprobs=st.lists(token_logprobs, max_size=3),
)
replies = st.builds(
    OpenReply,
    v=st.just(PROTOCOL_VERSION),
    session=names,
    version=names,
    context=counts,
    first=frames,
    needs_generated=st.booleans(),
    cached=counts,
)
details = st.dictionaries(names, st.one_of(counts, names, st.lists(names, max_size=3)), max_size=3)
refusals = st.builds(ErrorReply, v=st.just(PROTOCOL_VERSION), code=names, message=names, detail=details)
models = st.builds(
    ModelCard,
    id=names,
    version=names,
    vocabulary=names,
    vocabulary_size=counts,
    context=counts,
    max_draft=counts,
    max_nodes=counts,
    speculates=st.booleans(),
)
any_message = st.one_of(
    rounds, openings, frames, replies, refusals, models, st.builds(ModelList, data=st.lists(models, max_size=3))
)
kinds = st.sampled_from([RoundRequest, OpenRequest, Frame, OpenReply, ErrorReply, ModelList])


def decoded_or_refused(body: bytes, kind: type[Message], media_type: str) -> Message | None:
    """The decoded `body`, or None if it is rejected; any other exception fails the test."""
    try:
        return messages.decode(body, kind, media_type)
    except InputError as error:
        assert kind.__name__ in str(error)
        return None


@pytest.mark.slow
@given(any_message, encodings)
@settings(max_examples=200)
def test_round_trip(message: Message, media_type: str) -> None:
    assert messages.decode(messages.encode(message, media_type), type(message), media_type) == message


@given(rounds)
def test_json_is_the_struct_as_declared(message: RoundRequest) -> None:
    fields = msgspec.json.decode(messages.encode(message, JSON))
    assert fields == msgspec.to_builtins(message, str_keys=True)
    assert fields["v"] == PROTOCOL_VERSION


def test_trailing_defaults_are_omitted() -> None:
    assert messages.encode(RoundRequest(PROTOCOL_VERSION, 0, 5), MSGPACK) == messages.add_checksum(b"\x93\x01\x00\x05")
    two_ids = messages.add_checksum(b"\x94\x01\x02\x05\xc4\x03\x07\xac\x02")
    assert messages.encode(RoundRequest(PROTOCOL_VERSION, 2, 5, [7, 300]), MSGPACK) == two_ids
    # A default before a non-default field is written.
    assert messages.encode(RoundRequest(PROTOCOL_VERSION, 0, 5, n=9), MSGPACK) == messages.add_checksum(
        b"\x95\x01\x00\x05\x90\x09"
    )
    assert messages.encode(Frame(PROTOCOL_VERSION, 1, 2), MSGPACK) == messages.add_checksum(b"\x93\x01\x01\x02")
    assert messages.encode(RoundRequest(PROTOCOL_VERSION, 0, 5), JSON) == b'{"v":1,"round":0,"position":5}'


def test_an_early_round_costs_its_expected_token_and_four_bytes() -> None:
    """If the last field is present, the defaults before it are written: n, siblings, stream."""
    usual = RoundRequest(PROTOCOL_VERSION, 3, 700, [8191] * 5)
    ahead = msgspec.structs.replace(usual, expects=[8191])
    assert len(messages.encode(ahead, MSGPACK)) - len(messages.encode(usual, MSGPACK)) == 3 + 2 + 2


def test_a_documented_round_has_its_documented_size() -> None:
    """The module documents at most 23 bytes for five ids of an 8k vocabulary."""
    assert len(messages.encode(RoundRequest(PROTOCOL_VERSION, 3, 700, [8191] * 5), MSGPACK)) <= 23


vocabulary_ids = st.lists(st.integers(0, 152_000), max_size=32)


@given(st.integers(0, 65_535), st.integers(0, 131_072), vocabulary_ids, st.integers(1, 127))
def test_a_request_stays_within_its_budget(number: int, position: int, draft: list[int], n: int) -> None:
    body = messages.encode(RoundRequest(PROTOCOL_VERSION, number, position, draft, n), MSGPACK)
    assert len(body) <= 12 + 4 * len(draft) + messages.CHECKSUM_BYTES


short_times = st.integers(0, 65_535)
any_times = st.integers(0, 2**31 - 1)


@given(st.integers(0, 127), st.integers(0, 32), vocabulary_ids.filter(bool), short_times, short_times)
def test_a_frame_of_a_fast_target_stays_within_its_budget(
    number: int, accepted: int, tokens: list[int], queue_100us: int, forward_100us: int
) -> None:
    body = messages.encode(
        Frame(
            v=PROTOCOL_VERSION,
            round=number,
            accepted=accepted,
            tokens=tokens,
            queue_100us=queue_100us,
            forward_100us=forward_100us,
            load=100,
        ),
        MSGPACK,
    )
    assert len(body) <= 12 + 4 * len(tokens) + messages.CHECKSUM_BYTES


@given(st.integers(0, 65_535), vocabulary_ids, vocabulary_ids.filter(bool), any_times, any_times)
def test_a_round_trip_with_any_timings_stays_within_36_bytes(
    number: int, draft: list[int], tokens: list[int], queue_100us: int, forward_100us: int
) -> None:
    there = messages.encode(RoundRequest(PROTOCOL_VERSION, number, 65_535, draft), MSGPACK)
    back = messages.encode(
        Frame(
            v=PROTOCOL_VERSION,
            round=number,
            accepted=len(draft),
            tokens=tokens,
            queue_100us=queue_100us,
            forward_100us=forward_100us,
            load=100,
        ),
        MSGPACK,
    )
    assert len(there) + len(back) <= 36 + 4 * (len(draft) + len(tokens))


@pytest.mark.slow
@given(st.lists(frames, max_size=4), encodings, st.data())
def test_frames_are_split_at_any_chunk_boundaries(sent: list[Frame], media_type: str, data: st.DataObject) -> None:
    stream = b"".join(messages.encode_frame(frame, media_type, index=index) for index, frame in enumerate(sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter = FrameSplitter(media_type)
    received = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += [messages.decode(body, Frame, media_type) for body in splitter.feed(stream[start:stop])]
    assert received == sent
    assert not splitter.incomplete


@pytest.mark.slow
@given(st.lists(frames, min_size=2, max_size=4), st.data())
def test_a_message_that_is_lost_or_repeated_within_a_stream_is_noticed(sent: list[Frame], data: st.DataObject) -> None:
    parts = [messages.encode_frame(frame, MSGPACK, index=index) for index, frame in enumerate(sent)]
    place = data.draw(st.integers(0, len(parts) - 2))
    damaged = data.draw(
        st.sampled_from([parts[:place] + parts[place + 1 :], parts[: place + 1] + parts[place:], parts[::-1]])
    )
    with pytest.raises(messages.DamagedMessage):
        for body in FrameSplitter(MSGPACK).feed(b"".join(damaged)):
            messages.decode(body, Frame, MSGPACK)


@pytest.mark.slow
@given(frames, encodings, st.data())
def test_a_truncated_stream_is_incomplete(frame: Frame, media_type: str, data: st.DataObject) -> None:
    stream = messages.encode_frame(frame, media_type, index=0)
    splitter = FrameSplitter(media_type)
    assert list(splitter.feed(stream[: data.draw(st.integers(1, len(stream) - 1))])) == []
    assert splitter.incomplete


@given(st.lists(st.binary(max_size=30), max_size=5), encodings)
def test_garbage_in_a_stream_is_refused_or_incomplete(pieces: list[bytes], media_type: str) -> None:
    splitter = FrameSplitter(media_type)
    for piece in pieces:
        try:
            bodies = list(splitter.feed(piece))
        except InputError:
            return
        for body in bodies:
            decoded_or_refused(body, Frame, media_type)


def test_a_frame_length_that_never_ends_is_refused() -> None:
    splitter = FrameSplitter(MSGPACK)
    with pytest.raises(InputError):
        list(splitter.feed(b"\xff" * 64))


@given(st.lists(st.integers(0, 2**35 - 1)))
def test_varints_round_trip(numbers: list[int]) -> None:
    packed = messages.pack_varints(numbers)
    assert messages.unpack_varints(packed) == numbers
    assert len(packed) == sum(max(1, -(-number.bit_length() // 7)) for number in numbers)


@pytest.mark.parametrize("packed", [b"\x80", b"\x01\xff", b"\x80\x80\x80\x80\x80\x01", b"\xff" * 20], ids=repr)
def test_bad_varints_are_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="token id"):
        messages.unpack_varints(packed)


@given(st.binary(max_size=50))
def test_any_bytes_are_varints_or_a_value_error(packed: bytes) -> None:
    try:
        numbers = messages.unpack_varints(packed)
    except ValueError:
        return
    assert all(0 <= number < 2**35 for number in numbers)


@pytest.mark.slow
@given(st.binary(max_size=200), kinds, encodings)
@settings(max_examples=250)
def test_garbage_is_refused(body: bytes, kind: type[Message], media_type: str) -> None:
    decoded_or_refused(body, kind, media_type)


@pytest.mark.slow
@given(any_message, encodings, st.data())
@settings(max_examples=400)
def test_a_damaged_message_is_refused_or_another_message(
    message: Message, media_type: str, data: st.DataObject
) -> None:
    # With a valid checksum, because the parser never sees what the checksum rejects.
    body = messages.encode(message, media_type)
    body = (
        damaged(data, body)
        if media_type == JSON
        else messages.add_checksum(damaged(data, body[: -messages.CHECKSUM_BYTES]))
    )
    survivor = decoded_or_refused(body, type(message), media_type)
    if isinstance(survivor, RoundRequest | OpenRequest):  # the kinds without free floats, whose NaN equals nothing
        assert messages.decode(messages.encode(survivor, media_type), type(message), media_type) == survivor


def damaged(data: st.DataObject, body: bytes) -> bytes:
    """`body` with up to three parts overwritten, deleted, inserted or repeated."""
    mutant = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(mutant)))
        stop = min(len(mutant), start + data.draw(st.integers(0, 4)))
        mutant[start:stop] = data.draw(st.one_of(st.binary(max_size=6), st.just(bytes(mutant[start:] * 2))))
    return bytes(mutant)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(st.integers(-5, 2**40), max_size=4),
)
keys = st.one_of(st.text(max_size=5), st.integers(-3, 5), st.booleans(), st.binary(max_size=3))
flat = st.one_of(scalars, st.lists(scalars, max_size=4), st.dictionaries(keys, scalars, max_size=3))
nested = st.one_of(flat, st.lists(flat, max_size=7), st.dictionaries(keys, flat, max_size=3))


@pytest.mark.slow
@given(st.one_of(nested, st.lists(nested, min_size=3, max_size=10)), kinds)
@settings(max_examples=200)
def test_well_formed_msgpack_of_any_shape_is_refused_or_a_message(value: Any, kind: type[Message]) -> None:
    decoded_or_refused(messages.add_checksum(msgspec.msgpack.encode(value)), kind, MSGPACK)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(RoundRequest.__struct_fields__), nested), st.sampled_from([1, "1", None, []]))
@settings(max_examples=150)
@example({}, 1)
def test_json_fields_of_any_type_are_refused_or_a_message(fields: dict[str, Any], version: Any) -> None:
    try:
        body = msgspec.json.encode(fields | {"v": version})
    except (TypeError, ValueError, msgspec.MsgspecError):
        return  # no JSON exists for it
    decoded_or_refused(body, RoundRequest, JSON)


WRONG = [
    {"round": 0, "position": 1},
    {"v": 1, "position": 1},
    {"v": 1, "round": -1, "position": 1},
    {"v": 1, "round": 2**31, "position": 1},
    {"v": 1, "round": 0.5, "position": 1},
    {"v": 1, "round": "0", "position": 1},
    {"v": 1, "round": True, "position": 1},
    {"v": 1, "round": 0, "position": None},
    {"v": 1, "round": 0, "position": 1, "draft": 5},
    {"v": 1, "round": 0, "position": 1, "draft": [2**31]},
    {"v": 1, "round": 0, "position": 1, "draft": [-1]},
    {"v": 1, "round": 0, "position": 1, "draft": ["a"]},
    {"v": 1, "round": 0, "position": 1, "n": 0},
    {"v": 1, "round": 0, "position": 1, "n": 65_537},
    {"v": 1, "round": 0, "position": 1, "siblings": [[1]]},
    {"v": 1, "round": 0, "position": 1, "siblings": {"a": [1]}},
    {"v": 1, "round": 0, "position": 1, "siblings": {"-1": [1]}},
    {"v": 1, "round": 0, "position": 1, "stream": 1},
    {"v": 1, "round": 0, "position": 1, "expects": 5},
    {"v": 1, "round": 0, "position": 1, "expects": [5, 6]},
    {"v": 1, "round": 0, "position": 1, "expects": [-1]},
    {"v": 1, "round": 0, "position": 1, "surprise": 1},
    [],
    None,
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_wrong_fields_are_refused_in_json(fields: Any) -> None:
    with pytest.raises(InputError, match="not a RoundRequest in application/json"):
        messages.decode(msgspec.json.encode(fields), RoundRequest, JSON)


@pytest.mark.parametrize("fields", WRONG[2:-3], ids=str)
def test_wrong_fields_are_refused_in_msgpack(fields: dict[str, Any]) -> None:
    order = RoundRequest.__struct_fields__
    values: list[Any] = [1, 0, 1, [], 1, {}, False, []]
    for name, value in fields.items():
        values[order.index(name)] = value
    with pytest.raises(InputError, match="not a RoundRequest in application/msgpack"):
        messages.decode(messages.add_checksum(msgspec.msgpack.encode(values)), RoundRequest, MSGPACK)


def test_more_fields_than_the_struct_has_are_refused() -> None:
    with pytest.raises(InputError, match="9 fields, but RoundRequest has 8"):
        messages.decode(
            messages.add_checksum(msgspec.msgpack.encode([1, 0, 1, [], 1, {}, False, [], 0])), RoundRequest, MSGPACK
        )


@given(frames, st.data())
def test_a_flipped_bit_is_detected(frame: Frame, data: st.DataObject) -> None:
    body = bytearray(messages.encode(frame, MSGPACK))
    body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(messages.DamagedMessage, match="CRC-32"):
        messages.decode(bytes(body), Frame, MSGPACK)


def test_log_probabilities_cost_their_documented_bytes() -> None:
    tokens = [100, 20_000, 48_000, 31_000]
    frame = Frame(PROTOCOL_VERSION, 3, 2, tokens[2:])
    plain = len(messages.encode(frame, MSGPACK))
    for top, per_token in ((0, 3), (5, 28)):
        others = [(40_000 + index, -0.25 - 0.75 * index) for index in range(top)]
        entries = [TokenLogprobs(-0.5, others) for _ in tokens]
        size = len(messages.encode(msgspec.structs.replace(frame, logprobs=entries), MSGPACK))
        # Eight fields before it, which otherwise are trailing defaults, and the header of the bin.
        assert size - plain == per_token * len(tokens) + 8 + 2


def test_trailing_bytes_are_refused() -> None:
    for media_type in ENCODINGS:
        body = messages.encode(RoundRequest(PROTOCOL_VERSION, 0, 5), media_type)
        with pytest.raises(InputError):
            messages.decode(body + body, RoundRequest, media_type)


@pytest.mark.parametrize("depth", [20, 400, 2_000, 100_000])
@pytest.mark.parametrize(
    "opener", [b"\x91", b"\x81\x01", b"\x93\x01\x00", b"\x96\x01\x00\x05\x90\x01\x81\x00"], ids=repr
)
def test_deeply_nested_bodies_are_refused_in_msgpack(opener: bytes, depth: int) -> None:
    for body in (opener * depth, opener * depth + b"\x01" * 7 * depth):
        for kind in (RoundRequest, OpenRequest, ErrorReply):
            assert decoded_or_refused(messages.add_checksum(body), kind, MSGPACK) is None


@pytest.mark.parametrize("depth", [20, 400, 2_000, 100_000])
@pytest.mark.parametrize(
    "opener", [b"[", b'{"v":', b'{"v":1,"siblings":{"0":', b'{"v":1,"code":"","message":"","detail":{"a":']
)
def test_deeply_nested_bodies_are_refused_in_json(opener: bytes, depth: int) -> None:
    for kind in (RoundRequest, OpenRequest, ErrorReply):
        assert decoded_or_refused(opener * depth, kind, JSON) is None


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"], ids=repr)
def test_a_header_that_announces_gigabytes_is_refused(header: bytes) -> None:
    with pytest.raises(InputError):
        messages.decode(messages.add_checksum(header + b"\xff\xff\xff\xff"), RoundRequest, MSGPACK)


def test_sampling_out_of_range_is_refused_with_the_reason() -> None:
    wrong: list[tuple[str, Any]] = [("temperature", -1.0), ("temperature", 1e-9), ("top_p", 0.0), ("top_k", -1)]
    wrong += [("seed", 2**64), ("logit_bias", {"5": 101.0}), ("logit_bias", {"-5": 1.0}), ("stop_ids", [2**31])]
    wrong += [("repetition_penalty", 0.0), ("presence_penalty", 2.5), ("min_p", 1.5), ("min_tokens", -1)]
    for field, value in wrong:
        fields = {
            "v": 1,
            "key": "12345678",
            "prompt": [1],
            "first": {"v": 1, "round": 0, "position": 1},
            "sampling": {field: value},
        }
        with pytest.raises(InputError, match=r"sampling|temperature|seed"):
            messages.decode(msgspec.json.encode(fields), OpenRequest, JSON)
