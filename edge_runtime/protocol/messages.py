"""Protocol version 1: the messages of the board and the verifier, and their two encodings.

    POST   /v1/sessions               OpenRequest  -> OpenReply [, Frame ...]
    POST   /v1/sessions/{id}/rounds   RoundRequest -> Frame [, Frame ...]
    DELETE /v1/sessions/{id}                       -> 204
    GET    /v1/models                              -> ModelList

JSON (`application/json`) is the struct as declared, for people with curl. msgpack (`application/msgpack`) is what
boards speak: the same fields by position instead of by name, defaults at the end dropped, and every list of token ids
as LEB128 varints in one bin, and siblings in another: for each index of the draft one more than their count, then they
themselves; 0 where an index has none, nothing behind the last that has. The CRC-32 of it all comes last, of a
round and its frames begun with their session's id: where no TLS does, something must notice a flipped bit, which might
be a token, or lead a message to another session. A round of five drafted ids costs 23 bytes up and about as many down.

Where no content type is given, a body is msgpack: on HTTP/1.1 the header would cost more than most bodies.

A streamed reply is a sequence of messages: in msgpack each preceded by its length as a varint, in JSON one a line.
"""

from __future__ import annotations

import base64
import enum
import functools
import zlib
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec

from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling

VERSION = 1
MSGPACK = "application/msgpack"
JSON = "application/json"
# The media types of a streamed reply, by the encoding of its frames.
STREAMS = {MSGPACK: "application/msgpack-seq", JSON: "application/x-ndjson"}

# What every verifier takes in one round: draft tokens, tokens of its own, and nodes of the tree: the last known token,
# draft tokens and siblings.
MOST_DRAFT = 32
MOST_OWN = 512
MOST_NODES = 72

# Of the checksum behind a message in msgpack: CRC-32 of its session's id, if it has one, and of it, little-endian.
CHECK_BYTES = 4

# The verifier's batching interval of streamed frames: tokens of a streamed reply that become ready within this time of
# the last frame travel together in the next one. The planner and the simulator price the frames of a stream with it.
# Chosen: below what a reader notices, and few enough frames that their overhead stays small.
STREAM_FRAME_SECONDS = 0.02

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class ErrorCode(enum.StrEnum):
    """Why a request was refused; each travels with an HTTP status, a sentence and sometimes details."""

    MALFORMED = "malformed"  # 400: the body does not parse, or a field has the wrong type or range
    DAMAGED = "damaged"  # 400: the body is not what was sent; send it again
    UNSUPPORTED_VERSION = "unsupported_version"  # 400: not this protocol version
    INVALID_TOKEN = "invalid_token"  # 400: a token id outside the vocabulary
    INVALID_SAMPLING = "invalid_sampling"  # 400
    DRAFT_TOO_LONG = "draft_too_long"  # 400: detail: limit
    UNAUTHORIZED = "unauthorized"  # 401: no token, or one that is not known here
    FORBIDDEN = "forbidden"  # 403: the token is known, and its role does not allow this
    UNKNOWN_ROUTE = "unknown_route"  # 404, and 405 for a method that the route does not have
    UNKNOWN_MODEL = "unknown_model"  # 404: detail: available
    SESSION_LOST = "session_lost"  # 404: evicted, closed or from before a restart; open again with all ids
    WRONG_POSITION = "wrong_position"  # 409: detail: expected
    ROUND_OUT_OF_ORDER = "round_out_of_order"  # 409: replayed too late or skipped; detail: expected
    ROUND_CONFLICT = "round_conflict"  # 409: the same number as an answered round, but other contents
    ROUND_VOID = "round_void"  # 409: sent ahead on a guess that did not come true; nothing was played
    SESSION_FINISHED = "session_finished"  # 409: the text has ended
    VOCABULARY_MISMATCH = "vocabulary_mismatch"  # 409: the draft was made for another tokenizer
    DRAFT_MISMATCH = "draft_mismatch"  # 409: the target's shared tensors are not the draft's
    INCOMPATIBLE_TARGET = "incompatible_target"  # 409, to an admin: deployed drafts do not fit it; detail: differences
    TARGET_REFUSED = "target_refused"  # 409, to an admin: the registry, or what is on the disk, does not allow that
    TOO_LARGE = "too_large"  # 413: body over the limit; detail: limit
    CONTEXT_OVERFLOW = "context_overflow"  # 413: prompt over the target's context, or the token's limit; detail: limit
    RATE_LIMITED = "rate_limited"  # 429: over a limit of this token's; try again after `Retry-After`
    OVERLOADED = "overloaded"  # 503: try again after `Retry-After`
    DRAINING = "draining"  # 503: it ends as soon as its rounds have; ask another verifier, or again after `Retry-After`
    STARTING = "starting"  # 503: the target is still loading
    INTERNAL = "internal"  # 500: a fault of the verifier; its log says more


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of all messages. The protocol version comes first and is always written."""


class RoundRequest(Message, frozen=True):
    """One round: verify `draft`, then say `n` tokens of the target's own.

    Attributes:
        round: 0 for the round inside the opening request, then 1, 2, ...
        position: absolute position of the first draft token, equal to the number of ids known to both ends.
        draft: K token ids, drafted for positions `position` .. `position + K - 1`.
        n: tokens that the target produces itself after the accepted ones, at least 1.
        siblings: for a draft index, alternatives to the draft token there (not extended by the board).
        stream: answer in several frames, as tokens come.
        expects: nothing, or the token that must stand right before `position`; without it, the round is void. For a
            round that is sent before the last one was answered: it waits for that one to be over, and is then played
            as any other or refused as `round_void`.
        v: protocol version.
    """

    v: int
    round: Count
    position: Count
    draft: list[TokenId] = []
    n: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1
    siblings: dict[Annotated[int, msgspec.Meta(ge=0, lt=MOST_NODES)], list[TokenId]] = {}
    stream: bool = False
    expects: Annotated[list[TokenId], msgspec.Meta(max_length=1)] = []


class OpenRequest(Message, frozen=True):
    """Opens a session and plays its first round.

    Attributes:
        key: chosen by the client at random; the same key opens the same session, so that a repeated request is safe.
        model: a model id of `GET /v1/models`, or an exact version `id@hash`; empty for the default.
        prompt: all token ids so far, at least one.
        vocabulary: hash of the draft's vocabulary (`bundle.vocabulary_hash`); empty when there is no draft.
        draft: identity of the draft (`bundle.SharedTensors.identity`); empty when there is no draft.
    """

    v: int
    key: Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
    prompt: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    first: RoundRequest
    sampling: Sampling = Sampling()
    model: str = ""
    vocabulary: str = ""
    draft: str = ""


class Frame(Message, frozen=True):
    """The answer to a round, or a part of it when streamed.

    Attributes:
        round: the round it answers.
        accepted: how many leading draft tokens the target accepted; in the first frame only, 0 in later ones.
        tokens: the target's own tokens that follow them.
        queue_100us: time spent waiting for the engine so far, in units of 100 microseconds.
        forward_100us: time spent in target forwards so far, and in drafting beside the target, likewise: three bytes
            hold 6.5 seconds.
        load: share of the engine's session slots in use, percent.
        finish: empty, or why the text ended: `stop` (end-of-text token) or `length` (context full).
        more: further frames of this round follow.
        close_calls: (position, margin) where the two best coupled scores were so close that other arithmetic (another
            GPU, another batch shape) might have chosen differently.
        prefill_100us: time spent reading ids that the session's cache did not hold, likewise: only when it opens.
        further: target forwards behind the round's first, which said the further tokens of the target's own: as many
            as these, or fewer where the verifier drafts for itself. In a round's last frame only.
    """

    v: int
    round: Count
    accepted: Count = 0
    tokens: list[TokenId] = []
    queue_100us: Count = 0
    forward_100us: Count = 0
    load: Count = 0
    finish: str = ""
    more: bool = False
    close_calls: list[tuple[Count, float]] = []
    prefill_100us: Count = 0
    further: Count = 0


class OpenReply(Message, frozen=True):
    """A session, pinned to one exact target version. `context` is the longest text it can hold, in tokens."""

    v: int
    session: str
    version: str
    context: Count
    first: Frame


class Refusal(Message, frozen=True):
    """The body of every 4xx and 5xx answer."""

    v: int
    code: str
    message: str
    detail: dict[str, Any] = {}


class Model(Message, frozen=True, omit_defaults=False):
    """One target in the list of models, in the manner of OpenAI's `/v1/models`.

    Attributes:
        speculates: the verifier drafts the target's own tokens itself, so that those of a round with n > 1 cost fewer
            forwards than one each.
    """

    id: str
    version: str
    vocabulary: str
    vocabulary_size: int
    context: int
    max_draft: int
    max_nodes: int
    object: str = "model"
    speculates: bool = False


class ModelList(Message, frozen=True, omit_defaults=False):
    """The answer to `GET /v1/models`."""

    data: list[Model]
    object: str = "list"


M = TypeVar("M", bound=Message)


def encode(message: Message, media_type: str, session: str = "") -> bytes:
    """The body of one message.

    Args:
        media_type: MSGPACK or JSON.
        session: id of the session that it belongs to; for rounds and frames, not for openings and refusals.
    """
    if media_type == JSON:
        return msgspec.json.encode(message)
    return sealed(msgspec.msgpack.encode(_by_position(message)), session)


def sealed(body: bytes, session: str = "") -> bytes:
    """`body` with its checksum behind it, which begins with the session: over HTTP/2 a flipped bit may lead a message
    to another session, and that must not take it for its own."""
    return body + zlib.crc32(body, zlib.crc32(session.encode())).to_bytes(CHECK_BYTES, "little")


def mark_of(key: str) -> str:
    """What the id of a session begins with that was opened with `key`: so a reply says which opening it answers."""
    return base64.urlsafe_b64encode(zlib.crc32(key.encode()).to_bytes(4, "little")[:3]).decode()


class Damaged(InputError):
    """A body that is not what was sent."""


def decode(body: bytes, kind: type[M], media_type: str, session: str = "") -> M:
    """Parses one message; for `session` see `encode`.

    Raises:
        Damaged: its checksum is not that of its session and bytes.
        InputError: the body is not `kind` in this encoding; the message says which field is wrong.
    """
    if media_type != JSON:
        whole, body = body, body[:-CHECK_BYTES]
        if whole != sealed(body, session):
            raise Damaged(f"not a {kind.__name__} in {media_type}: the CRC-32 behind it is wrong, or missing")
    try:
        if media_type == JSON:
            return msgspec.json.decode(body, type=kind)
        return msgspec.convert(_by_name(msgspec.msgpack.decode(body), kind), kind)
    # RecursionError: a bomb of nested arrays; the decoder itself stops at a depth, our walk at the struct's shape.
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"not a {kind.__name__} in {media_type}: {error}") from None


class _Versioned(msgspec.Struct):
    v: int


def version_of(body: bytes, media_type: str) -> int | None:
    """The protocol version that a message claims, whatever the rest of it; None where there is none."""
    try:
        if media_type == JSON:
            return msgspec.json.decode(body, type=_Versioned).v
        fields = msgspec.msgpack.decode(body[:-CHECK_BYTES])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return fields[0] if isinstance(fields, list) and fields and type(fields[0]) is int else None


class _Keyed(msgspec.Struct):
    key: str


def key_of(body: bytes, media_type: str) -> str | None:
    """The key that an opening claims, whatever the rest of it; None where there is none."""
    try:
        if media_type == JSON:
            return msgspec.json.decode(body, type=_Keyed).key
        fields = msgspec.msgpack.decode(body[:-CHECK_BYTES])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return fields[1] if isinstance(fields, list) and len(fields) > 1 and isinstance(fields[1], str) else None


def encode_frame(message: Message, media_type: str, session: str = "") -> bytes:
    """One message of a streamed reply, delimited; for `session` see `encode`."""
    body = encode(message, media_type, session)
    return body + b"\n" if media_type == JSON else pack_varints([len(body)]) + body


class FrameSplitter:
    """Cuts a streamed reply into message bodies, whatever the pieces in which it arrives."""

    def __init__(self, media_type: str) -> None:
        self._json = media_type == JSON
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Adds received bytes and yields each body that is now complete."""
        self._buffer += piece
        while (cut := self._cut()) is not None:
            start, stop, rest = cut
            body = bytes(self._buffer[start:stop])
            del self._buffer[:rest]
            yield body

    @property
    def incomplete(self) -> bool:
        """Whether the reply ended, if it ended here, in mid-message."""
        return bool(self._buffer)

    def _cut(self) -> tuple[int, int, int] | None:
        if self._json:
            end = self._buffer.find(b"\n")
            return None if end < 0 else (0, end, end + 1)
        length = shift = 0
        for index, byte in enumerate(self._buffer[:5]):
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                start = index + 1
                return (start, start + length, start + length) if len(self._buffer) >= start + length else None
        if shift == 35:
            raise InputError("a frame's length is longer than five bytes: this is no stream of frames")
        return None


def pack_varints(numbers: list[int]) -> bytes:
    """LEB128: seven bits a byte, least significant first, the top bit set on all but the last byte of a number."""
    out = bytearray()
    for number in numbers:
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)


def unpack_varints(packed: bytes) -> list[int]:
    """Inverse of `pack_varints`. Raises ValueError on a number over 35 bits or one that the bytes cut short."""
    numbers: list[int] = []
    number = shift = 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > 28:
                raise ValueError("a token id is longer than five bytes")
        else:
            numbers.append(number)
            number = shift = 0
    if shift:
        raise ValueError("the last token id is cut short")
    return numbers


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def _by_position(message: msgspec.Struct) -> list[Any]:
    """Field values in declared order, defaults at the end dropped, lists of ids packed."""
    values = list(msgspec.structs.astuple(message))
    defaults = [default for _, _, default in _shape(type(message))]
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return [_packed(value) for value in values]


def _packed(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _by_position(value)
    if _is_ids(value):
        return pack_varints(value)
    if isinstance(value, dict):
        if value and all(type(key) is int for key in value):
            return _pack_siblings(value)
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_packed(item) for item in value]
    return value


def _pack_siblings(siblings: dict[int, list[int]]) -> bytes:
    numbers: list[int] = []
    for index in range(max(siblings) + 1):
        ids = siblings.get(index)
        numbers += [0] if ids is None else [len(ids) + 1, *ids]
    return pack_varints(numbers)


def _unpack_siblings(packed: bytes) -> dict[int, list[int]]:
    numbers, siblings, index, start = unpack_varints(packed), {}, 0, 0
    while start < len(numbers):
        size = numbers[start]
        if size:
            siblings[index] = numbers[start + 1 : start + size]
        index, start = index + 1, start + max(size, 1)
    if start > len(numbers):
        raise ValueError("the last siblings are cut short")
    return siblings


def _by_name(value: Any, kind: Any) -> Any:
    """Inverse of `_by_position` as far as a struct's shape says; everything else is left for msgspec to judge."""
    if isinstance(value, bytes):
        return _unpack_siblings(value) if getattr(kind, "__origin__", None) is dict else unpack_varints(value)
    if isinstance(value, dict):
        return {key: _by_name(item, None) for key, item in value.items()}
    if isinstance(value, list) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        shape = _shape(kind)
        if len(value) > len(shape):
            raise ValueError(f"{len(value)} fields where {kind.__name__} has {len(shape)}")
        return {name: _by_name(item, type_) for (name, type_, _), item in zip(shape, value, strict=False)}
    if isinstance(value, list) and getattr(kind, "__origin__", None) is list:
        return [_by_name(item, kind.__args__[0]) for item in value]
    return value


@functools.cache
def _shape(kind: type[msgspec.Struct]) -> list[tuple[str, Any, Any]]:
    """(name, type, default) of each field in declared order; without a default, one that equals nothing."""
    return [
        (
            field.name,
            field.type,
            field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default,
        )
        for field in msgspec.structs.fields(kind)
    ]
