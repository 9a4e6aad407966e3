"""The wire protocol between board and verifier, version 1: messages, their two encodings, and streams of frames.

    POST   /v1/sessions               OpenRequest  -> OpenReply [, Frame ...]
    POST   /v1/sessions/{id}/rounds   RoundRequest -> Frame [, Frame ...]
    DELETE /v1/sessions/{id}                       -> 204
    GET    /v1/models                              -> ModelList

Every 4xx and 5xx answer is an `ErrorReply`. Rounds are idempotent by (session, round number): a repeated request gets
the recorded answer.

JSON (`application/json`) is the struct as declared, for people with curl. Boards use msgpack (`application/msgpack`),
which is also the default without a content type, because on HTTP/1.1 that header would cost more than most bodies:

    fields      an array in declared order; trailing fields that have their default are omitted
    token ids   a non-empty list of ids is one bin of LEB128 varints
    siblings    one bin of varints: for each draft index from 0 to the last with siblings, 0 if it has none, else the
                number of its siblings + 1, followed by the siblings
    logprobs    one bin of varints for all tokens of a frame: for each its -log p, the number of most probable tokens,
                and the id and -log p of each of these. -log p is in units of 1/4096 nat. With k = 1 that is about
                three bytes a token, with k = 6 about 28
    checksum    after the array, 4 bytes: the CRC-32 of session id and array, little-endian

The checksum includes the session id for `RoundRequest` and `Frame`; for other messages that id is empty. Without TLS
something must detect a flipped bit, which could change a token or lead a message to another session.

A streamed reply is a sequence of messages: in JSON each is a line; in msgpack each is preceded by its length as a
varint, and the number of messages before it is XORed to its checksum. Otherwise a message could be lost unnoticed: over
HTTP/2, a flipped bit in a frame's stream id leads a whole message to another stream.

A round of five draft tokens costs 23 bytes up and about as many down.
"""

from __future__ import annotations

import base64
import enum
import functools
import zlib
from collections.abc import Iterator
from typing import Annotated, Any, Self, TypeVar

import msgspec

from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.protocol.varints import pack_varints, unpack_varints

PROTOCOL_VERSION = 1
MSGPACK = "application/msgpack"
JSON = "application/json"
# Media types of a streamed reply, by the encoding of its frames.
STREAM_MEDIA_TYPES = {MSGPACK: "application/msgpack-seq", JSON: "application/x-ndjson"}

# What every verifier accepts in one round, at most: draft tokens, tokens that the target generates after the accepted
# ones, and nodes of the token tree, which are the last known token, the draft tokens and their siblings.
MAX_DRAFT_TOKENS = 32
MAX_CONTINUATION_TOKENS = 512
MAX_TREE_NODES = 72
# Bytes of a reply, of all frames together if it is streamed. Chosen: ten times what MAX_CONTINUATION_TOKENS with
# MAX_LOGPROBS take.
MAX_REPLY_BYTES = 1 << 20

# Length of the checksum after a msgpack message.
CHECKSUM_BYTES = 4

# The verifier's batching interval of streamed frames: tokens that become ready within this time after a frame travel
# together in the next one. The planner and the simulator price the frames of a stream with it.
# Chosen: a frame costs some 25 bytes, and a reader notices no difference.
STREAM_FRAME_SECONDS = 0.02

# Log-probabilities are rounded to multiples of 1 / LOGPROB_UNITS nats: two bytes each below 4 nats, and an error of the
# probability of at most 0.012 %. Chosen. They are bounded as vLLM bounds them.
LOGPROB_UNITS = 4096
MIN_LOGPROB = -9999.0
# The largest `OpenRequest.logprobs`: the token itself, and OpenAI's limit of `top_logprobs`.
MAX_LOGPROBS = 21

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Logprob = Annotated[float, msgspec.Meta(ge=MIN_LOGPROB, le=0.0)]


class ErrorCode(enum.StrEnum):
    """Why a request was refused. The comments give the cause and the fields of `ErrorReply.detail`.

    Attributes:
        status: HTTP status of the answer.
    """

    status: int

    def __new__(cls, code: str, status: int) -> Self:
        member = str.__new__(cls, code)
        member._value_, member.status = code, status
        return member

    MALFORMED = "malformed", 400  # the body does not parse, or a field has the wrong type or range
    DAMAGED = "damaged", 400  # the checksum is wrong; send the request again
    UNSUPPORTED_VERSION = "unsupported_version", 400  # another protocol version
    INVALID_TOKEN = "invalid_token", 400  # a token id outside the vocabulary; detail: field
    INVALID_SAMPLING = "invalid_sampling", 400  # a sampling parameter out of range
    INVALID_GRAMMAR = "invalid_grammar", 400  # the grammar is invalid or too costly, also while the text is generated
    DRAFT_TOO_LONG = "draft_too_long", 400  # detail: limit
    UNAUTHORIZED = "unauthorized", 401  # no bearer token, or an unknown one
    FORBIDDEN = "forbidden", 403  # by the role of the bearer token, or by the Host header of a local verifier
    UNKNOWN_ROUTE = "unknown_route", 404  # and 405 for a method that the route does not have
    UNKNOWN_MODEL = "unknown_model", 404  # detail: available
    SESSION_LOST = "session_lost", 404  # evicted, closed or from before a restart; open again with all ids
    WRONG_POSITION = "wrong_position", 409  # detail: expected
    ROUND_OUT_OF_ORDER = "round_out_of_order", 409  # skipped, or repeated too late; detail: expected
    ROUND_CONFLICT = "round_conflict", 409  # the number of an answered round with other contents
    ROUND_VOID = "round_void", 409  # sent ahead with a wrong `expects`; the round was not executed
    SESSION_FINISHED = "session_finished", 409  # the text has ended
    VOCABULARY_MISMATCH = "vocabulary_mismatch", 409  # the draft was made for another tokenizer
    DRAFT_MISMATCH = "draft_mismatch", 409  # the draft's shared tensors are not the target's
    INCOMPATIBLE_TARGET = "incompatible_target", 409  # admin: deployed drafts do not fit it; detail: differences
    TARGET_REFUSED = "target_refused", 409  # admin: the registry or the checkpoint on disk does not allow it
    TOO_SLOW = "too_slow", 408  # the body did not arrive in time
    TOO_LARGE = "too_large", 413  # the body exceeds the limit; detail: limit
    CONTEXT_OVERFLOW = "context_overflow", 413  # prompt over the target's context or the client's limit; detail: limit
    RATE_LIMITED = "rate_limited", 429  # over a limit of this client's; retry after `Retry-After`
    OVERLOADED = "overloaded", 503  # retry after `Retry-After`
    DRAINING = "draining", 503  # finishing its rounds before it stops; try another verifier, or after `Retry-After`
    STARTING = "starting", 503  # the target is still loading
    INTERNAL = "internal", 500  # a fault of the verifier; see its log


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of all messages. Their first field, `v`, is the protocol version and has no default."""


class RoundRequest(Message, frozen=True):
    """One round: verify `draft`, then generate `n` further tokens with the target.

    Attributes:
        round: 0 for the round inside the opening request, then 1, 2, ...
        position: absolute position of the first draft token; equals the number of ids known to both ends.
        draft: K draft tokens, for positions `position` .. `position + K - 1`.
        n: number of tokens that the target generates after the accepted ones, at least 1.
        siblings: by draft index, alternatives to the draft token there; the board does not extend them.
        stream: answer in several frames, as tokens are generated.
        expects: empty, or the one token that must precede `position`; otherwise the round is void. For a round that is
            sent before the previous one is answered: the verifier executes it after that one, or refuses it with
            `round_void`.
    """

    v: int
    round: Count
    position: Count
    draft: list[TokenId] = []
    n: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1
    siblings: dict[Annotated[int, msgspec.Meta(ge=0, lt=MAX_TREE_NODES)], list[TokenId]] = {}
    stream: bool = False
    expects: Annotated[list[TokenId], msgspec.Meta(max_length=1)] = []


class OpenRequest(Message, frozen=True):
    """Opens a session and executes its first round.

    Attributes:
        key: random string chosen by the client; the same key opens the same session, so a request may be repeated.
        prompt: all token ids so far, at least one.
        model: a model id of `GET /v1/models`, or an exact version `id@hash`; empty for the default.
        vocabulary: hash of the draft's vocabulary (`bundle.hash_vocabulary`); empty without a draft.
        draft: identity of the draft (`bundle.SharedTensors.identity`); empty without a draft.
        generated: when a lost session is reopened, how many of the last ids of `prompt` were not in the prompt of the
            first. Only if that session's `OpenReply` set `needs_generated`, or `Sampling.depends_on_prompt_end`.
        logprobs: 0, or k to ask for `Frame.logprobs`, with the k - 1 most probable tokens at each position.
    """

    v: int
    key: Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
    prompt: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    first: RoundRequest
    sampling: Sampling = Sampling()
    model: str = ""
    vocabulary: str = ""
    draft: str = ""
    generated: Count = 0
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] = 0


class TokenLogprobs(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Log-probabilities at one position: natural logarithms of the target's softmax, before any processing of logits.

    Attributes:
        logprob: of the token there; a multiple of 1 / LOGPROB_UNITS and at least MIN_LOGPROB.
        top: (token id, log-probability) of the most probable tokens, most probable first, ties to the lower id.
    """

    logprob: Logprob
    top: list[tuple[TokenId, Logprob]] = []


class Frame(Message, frozen=True):
    """The answer to a round, or one part of it if it is streamed.

    Times are in units of 100 microseconds and count from the start of the round; three bytes hold 6.5 seconds.

    Attributes:
        accepted: number of leading draft tokens that the target accepted; set in the first frame, 0 in later ones.
        tokens: the target's own tokens after the accepted ones.
        queue_100us: time spent waiting for the engine.
        forward_100us: time spent in target forwards, and in drafting on the verifier.
        load: share of the engine's session slots in use, percent.
        finish: empty, or why the text ended: `stop` (end-of-text token) or `length` (context full).
        more: further frames of this round follow.
        close_calls: (position, margin) for each token whose two best coupled scores were so close that other arithmetic
            (another GPU, another batch shape) might have chosen differently.
        prefill_100us: time spent in prefill of ids that were not in the session's KV cache; only when it opens.
        further: number of target forwards after the round's first, for the target's further tokens: one for each token,
            or fewer if the verifier drafts. Only in the last frame.
        logprobs: if the opening asked for them, one entry for each accepted draft token and for each of `tokens`.
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
    logprobs: list[TokenLogprobs] = []


class OpenReply(Message, frozen=True):
    """The answer to an opening.

    Attributes:
        session: id of the session.
        version: exact target version to which the session is pinned.
        context: longest text of the session, in tokens.
        first: the answer to the first round.
        needs_generated: the target's logits depend on where the prompt ended, so a reopening must set `generated`.
        cached: number of prompt tokens whose KV cache was reused.
    """

    v: int
    session: str
    version: str
    context: Count
    first: Frame
    needs_generated: bool = False
    cached: Count = 0


class ErrorReply(Message, frozen=True):
    """The body of every 4xx and 5xx answer.

    Attributes:
        code: a value of `ErrorCode`.
        message: what was wrong and what to do, in one sentence.
        detail: the fields that `ErrorCode` documents for this code.
    """

    v: int
    code: str
    message: str
    detail: dict[str, Any] = {}


class ModelCard(Message, frozen=True, omit_defaults=False):
    """One target in the list of models, modeled on OpenAI's `/v1/models`.

    Attributes:
        version: exact version, `id@hash`.
        vocabulary: `bundle.hash_vocabulary` of the tokenizer.
        context: longest text in tokens.
        max_draft: draft tokens per round.
        max_nodes: nodes of the token tree per round.
        speculates: the verifier drafts the target's own tokens itself, so that a round with n > 1 takes fewer forwards
            than tokens.
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

    data: list[ModelCard]
    object: str = "list"


class DamagedMessage(InputError):
    """The checksum of a message does not match its bytes and its session."""


M = TypeVar("M", bound=Message)


def encode(message: Message, media_type: str, session: str = "") -> bytes:
    """Encode one message.

    Args:
        media_type: MSGPACK or JSON.
        session: id of the session of a `RoundRequest` or a `Frame`; empty for other messages.
    """
    if media_type == JSON:
        return msgspec.json.encode(message)
    return add_checksum(msgspec.msgpack.encode(_to_array(message)), session)


def decode(body: bytes, kind: type[M], media_type: str, session: str = "") -> M:
    """Decode one message of type `kind`; for `session` see `encode`.

    Raises:
        DamagedMessage: the checksum does not match.
        InputError: the body is not a `kind` in this encoding; the error message names the wrong field.
    """
    if media_type != JSON:
        received, body = body, body[:-CHECKSUM_BYTES]
        if received != add_checksum(body, session):
            raise DamagedMessage(f"not a {kind.__name__} in {media_type}: its CRC-32 is wrong or missing")
    try:
        if media_type == JSON:
            return msgspec.json.decode(body, type=kind)
        return msgspec.convert(_to_fields(msgspec.msgpack.decode(body), kind), kind)
    # RecursionError: deeply nested arrays from an attacker. The decoder stops at a depth, `_to_fields` at the struct's.
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"not a {kind.__name__} in {media_type}: {error}") from None


def add_checksum(body: bytes, session: str = "") -> bytes:
    """Append the checksum of `session` and `body` to `body`.

    The session id is included because over HTTP/2 a flipped bit may lead a message to another session, which must not
    accept it.
    """
    return body + zlib.crc32(body, zlib.crc32(session.encode())).to_bytes(CHECKSUM_BYTES, "little")


def session_id_prefix(key: str) -> str:
    """Return the prefix of the id of a session opened with `key`: it shows which opening a reply answers."""
    return base64.urlsafe_b64encode(zlib.crc32(key.encode()).to_bytes(4, "little")[:3]).decode()


class _Versioned(msgspec.Struct):
    v: int


def peek_version(body: bytes, media_type: str) -> int | None:
    """Return the protocol version of a message without validating the rest; None if there is none."""
    try:
        if media_type == JSON:
            return msgspec.json.decode(body, type=_Versioned).v
        fields = msgspec.msgpack.decode(body[:-CHECKSUM_BYTES])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return fields[0] if isinstance(fields, list) and fields and type(fields[0]) is int else None


class _Keyed(msgspec.Struct):
    key: str


def peek_session_key(body: bytes, media_type: str) -> str | None:
    """Return the key of an opening request without validating the rest; None if there is none."""
    try:
        if media_type == JSON:
            return msgspec.json.decode(body, type=_Keyed).key
        fields = msgspec.msgpack.decode(body[:-CHECKSUM_BYTES])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return fields[1] if isinstance(fields, list) and len(fields) > 1 and isinstance(fields[1], str) else None


def encode_frame(message: Message, media_type: str, session: str = "", *, index: int) -> bytes:
    """Encode one message of a streamed reply, with its delimiter.

    Args:
        session: see `encode`.
        index: number of messages before it.
    """
    body = encode(message, media_type, session)
    if media_type == JSON:
        return body + b"\n"
    return pack_varints([len(body)]) + _number_checksum(body, index)


def _number_checksum(body: bytes, index: int) -> bytes:
    """XOR `index` to the checksum at the end of a message; the inverse of itself."""
    if len(body) < CHECKSUM_BYTES:
        return body
    checksum = int.from_bytes(body[-CHECKSUM_BYTES:], "little") ^ index
    return body[:-CHECKSUM_BYTES] + checksum.to_bytes(CHECKSUM_BYTES, "little")


class FrameSplitter:
    """Splits a streamed reply into message bodies, independent of the chunks in which it arrives."""

    def __init__(self, media_type: str) -> None:
        self._json = media_type == JSON
        self._buffer = bytearray()
        self._count = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Add received bytes and yield each body that is now complete.

        Raises:
            InputError: this is no such stream, or a body is larger than MAX_REPLY_BYTES; it is not waited for.
        """
        self._buffer += chunk
        while (bounds := self._find_body()) is not None:
            start, stop, consumed = bounds
            body = bytes(self._buffer[start:stop])
            del self._buffer[:consumed]
            yield body if self._json else _number_checksum(body, self._count)
            self._count += 1

    @property
    def incomplete(self) -> bool:
        """Whether the bytes so far end within a message."""
        return bool(self._buffer)

    def _find_body(self) -> tuple[int, int, int] | None:
        """Start and end of the first complete body, and the number of bytes to drop with it."""
        if self._json:
            end = self._buffer.find(b"\n")
            _check_size(end if end >= 0 else len(self._buffer))
            return None if end < 0 else (0, end, end + 1)
        length = shift = 0
        for index, byte in enumerate(self._buffer[:5]):
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                start = index + 1
                _check_size(length)
                return (start, start + length, start + length) if len(self._buffer) >= start + length else None
        if shift == 35:
            raise InputError("a frame's length is longer than five bytes: this is no stream of frames")
        return None


def _check_size(length: int) -> None:
    if length > MAX_REPLY_BYTES:
        raise InputError(f"a frame of {length} bytes, and {MAX_REPLY_BYTES} are the most: this is no stream of frames")


def _to_array(message: msgspec.Struct) -> list[Any]:
    """Field values in declared order without trailing defaults, lists of ids packed."""
    values = list(msgspec.structs.astuple(message))
    defaults = [default for _, _, default in _fields_of(type(message))]
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return [_pack(value) for value in values]


def _pack(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _to_array(value)
    if isinstance(value, list):
        if value and isinstance(value[0], TokenLogprobs):
            return pack_logprobs(value)
        is_ids = bool(value) and type(value[0]) is int
        return pack_varints(value) if is_ids else [_pack(item) for item in value]
    if isinstance(value, dict):
        if value and all(type(key) is int and isinstance(item, list) for key, item in value.items()):
            return _pack_siblings(value)
        return {key: _pack(item) for key, item in value.items()}
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
        raise ValueError("the last siblings are truncated")
    return siblings


def pack_logprobs(entries: list[TokenLogprobs]) -> bytes:
    """Encode the log-probabilities of a frame; see the module."""
    numbers: list[int] = []
    for entry in entries:
        numbers += [_to_units(entry.logprob), len(entry.top)]
        for token, logprob in entry.top:
            numbers += [token, _to_units(logprob)]
    return pack_varints(numbers)


def _unpack_logprobs(packed: bytes) -> list[dict[str, Any]]:
    numbers, entries = iter(unpack_varints(packed)), []
    try:
        for units in numbers:
            top = [(next(numbers), -next(numbers) / LOGPROB_UNITS) for _ in range(next(numbers))]
            entries.append({"logprob": -units / LOGPROB_UNITS, "top": top})
    except StopIteration:
        raise ValueError("the last log-probabilities are truncated") from None
    return entries


def _to_units(logprob: float) -> int:
    return round(-logprob * LOGPROB_UNITS)


def _to_fields(value: Any, kind: Any) -> Any:
    """Inverse of `_to_array` for a struct type `kind`; msgspec validates the types of the result."""
    if isinstance(value, bytes):
        if kind == list[TokenLogprobs]:
            return _unpack_logprobs(value)
        return _unpack_siblings(value) if getattr(kind, "__origin__", None) is dict else unpack_varints(value)
    if isinstance(value, dict):
        return {key: _to_fields(item, None) for key, item in value.items()}
    if isinstance(value, list) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = _fields_of(kind)
        if len(value) > len(fields):
            raise ValueError(f"{len(value)} fields, but {kind.__name__} has {len(fields)}")
        return {name: _to_fields(item, type_) for (name, type_, _), item in zip(fields, value, strict=False)}
    if isinstance(value, list) and getattr(kind, "__origin__", None) is list:
        return [_to_fields(item, kind.__args__[0]) for item in value]
    return value


@functools.cache
def _fields_of(kind: type[msgspec.Struct]) -> list[tuple[str, Any, Any]]:
    """(name, type, default) of each field in declared order; the default of a required field equals no value."""
    return [
        (
            field.name,
            field.type,
            field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default,
        )
        for field in msgspec.structs.fields(kind)
    ]
