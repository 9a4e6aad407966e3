"""What the service says no with: OpenAI's error object, its HTTP status, and when to come back."""

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

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RATE_LIMIT = "rate_limit_error"

# Seconds after which another attempt is worth while: the link is back, the verifier has loaded.
LINK_RETRY_SECONDS = 5
BRIEF_RETRY_SECONDS = 1


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's error object.

    Attributes:
        message: what was wrong, where, and what to do.
        type: `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
        param: the field that was wrong, where there is one.
        code: which error it is, for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every 4xx and 5xx answer, and the data of an `error` event."""

    error: ErrorObject


class ApiError(Exception):
    """Ends a request; never leaves the service otherwise than as an answer.

    Attributes:
        status: of HTTP.
        body: what is answered.
        retry_after: seconds; None where coming back does not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorObject(message, kind, param, code))
        self.retry_after = retry_after


# Refusals of a verifier that the request itself brought about; all others are between board and verifier.
_ASKED_WRONGLY = {
    ErrorCode.UNKNOWN_MODEL: (404, "model", "model_not_found"),
    ErrorCode.CONTEXT_OVERFLOW: (400, None, "context_length_exceeded"),
    ErrorCode.INVALID_TOKEN: (400, "prompt", "invalid_token"),
    ErrorCode.INVALID_SAMPLING: (400, None, "invalid_sampling"),
}


def to_api_error(error: Exception) -> ApiError:
    """How an error of an answer looks to the one who asked."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, ContextOverflow):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, VerifierUnreachable):
        return ApiError(503, str(error), kind=SERVER_ERROR, code=error.fault, retry_after=LINK_RETRY_SECONDS)
    if isinstance(error, VerifierRefused):
        sentence = str(error).removesuffix(f" [{error.code}]")
        if error.code in _ASKED_WRONGLY:
            status, param, code = _ASKED_WRONGLY[ErrorCode(error.code)]
            return ApiError(status, sentence, param=param, code=code)
        wait = error.retry_after or BRIEF_RETRY_SECONDS
        if error.code == ErrorCode.RATE_LIMITED:
            return ApiError(429, sentence, kind=RATE_LIMIT, code=error.code, retry_after=wait)
        if error.code in (ErrorCode.OVERLOADED, ErrorCode.STARTING, ErrorCode.DRAINING):
            return ApiError(503, sentence, kind=SERVER_ERROR, code=error.code, retry_after=wait)
        return ApiError(502, f"the verifier refused: {sentence}", kind=SERVER_ERROR, code=error.code)
    if isinstance(error, FlexSpecError):
        return ApiError(500, str(error), kind=SERVER_ERROR, code=type(error).__name__)
    return ApiError(500, "a fault of the service; its log says more", kind=SERVER_ERROR, code="internal_error")
