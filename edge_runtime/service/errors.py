"""Errors of the HTTP API: OpenAI's error object, the HTTP status, and Retry-After."""

from __future__ import annotations

import msgspec

from edge_runtime.protocol.errors import (
    ContextOverflow,
    FlexSpecError,
    InputError,
    VerifierRefused,
    VerifierUnreachable,
)
from edge_runtime.protocol.messages import ErrorCode

# OpenAI's error type by HTTP status; that of other 4xx and 5xx statuses depends on who is at fault.
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# The code of errors that say nothing more precise.
DEFAULT_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}

# Retry-After, chosen: after a link failure, and while the draft model or the verifier loads.
LINK_RETRY_SECONDS = 5
BRIEF_RETRY_SECONDS = 1


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's error object.

    Attributes:
        message: what was wrong, where, and what to do.
        type: `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
        param: the invalid field, if the error concerns one.
        code: machine-readable cause.
    """

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every 4xx and 5xx response, and the data of an `error` event."""

    error: ErrorObject


class ApiError(Exception):
    """Ends a request with an error response. Never leaves the service as an exception.

    Attributes:
        status: HTTP status.
        retry_after: seconds; None if a retry would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        code = code or DEFAULT_CODES.get(status, "internal_error")
        self.body = ErrorBody(ErrorObject(message, kind, param, code))
        self.retry_after = retry_after


# Verifier errors that the client's request caused: (status, param, code). All others concern board and verifier only.
_CLIENT_ERRORS: dict[str, tuple[int, str | None, str]] = {
    ErrorCode.UNKNOWN_MODEL: (404, "model", "model_not_found"),
    ErrorCode.CONTEXT_OVERFLOW: (400, None, "context_length_exceeded"),
    ErrorCode.INVALID_TOKEN: (400, "prompt", "invalid_token"),
    ErrorCode.INVALID_SAMPLING: (400, None, "invalid_sampling"),
    ErrorCode.INVALID_GRAMMAR: (400, None, "invalid_grammar"),
}
# Fields of the protocol that hold token ids, and those of requests that they come from.
_FIELDS = {"logit_bias": "logit_bias", "stop_ids": "stop_token_ids"}


def to_api_error(error: Exception) -> ApiError:
    """Convert an exception raised while handling a request to the error that the client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, MemoryError):
        message = "the service has reached the limit of its memory; try again, or lower service.max_concurrent"
        return ApiError(503, message, code="out_of_memory", retry_after=LINK_RETRY_SECONDS)
    if isinstance(error, ContextOverflow):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, VerifierUnreachable):
        return ApiError(503, str(error), code=error.fault, retry_after=LINK_RETRY_SECONDS)
    if isinstance(error, VerifierRefused):
        message = str(error).removesuffix(f" [{error.code}]")
        limit = error.detail.get("limit")
        if error.code == ErrorCode.CONTEXT_OVERFLOW and limit is not None:
            # OpenAI's words, by which clients recognize it.
            message = f"This model's maximum context length is {limit} tokens. However, {message}."
        if error.code in _CLIENT_ERRORS:
            status, param, code = _CLIENT_ERRORS[error.code]
            if error.code == ErrorCode.INVALID_TOKEN:
                param = _FIELDS.get(str(error.detail.get("field")), param)
            return ApiError(status, message, param=param, code=code)
        retry_after = error.retry_after or BRIEF_RETRY_SECONDS
        if error.code == ErrorCode.RATE_LIMITED:
            return ApiError(429, message, code=error.code, retry_after=retry_after)
        if error.code in (ErrorCode.OVERLOADED, ErrorCode.STARTING, ErrorCode.DRAINING):
            return ApiError(503, message, code=error.code, retry_after=retry_after)
        return ApiError(502, f"the verifier refused: {message}", code=error.code)
    if isinstance(error, FlexSpecError):
        return ApiError(500, str(error), code=type(error).__name__)
    return ApiError(500, "internal error of the service; see its log", code="internal_error")
