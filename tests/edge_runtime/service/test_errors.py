"""What a verifier's refusal looks like to the one who asked the board."""

from __future__ import annotations

import pytest

from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode
from edge_runtime.service.errors import to_api_error


@pytest.mark.parametrize(
    ("code", "theirs", "wait", "status", "kind", "retry_after"),
    [
        (ErrorCode.RATE_LIMITED, 429, 7, 429, "rate_limit_error", 7),
        (ErrorCode.RATE_LIMITED, 429, None, 429, "rate_limit_error", 1),
        (ErrorCode.DRAINING, 503, 1, 503, "server_error", 1),
        (ErrorCode.OVERLOADED, 503, 2, 503, "server_error", 2),
        (ErrorCode.UNAUTHORIZED, 401, None, 502, "server_error", None),
        (ErrorCode.FORBIDDEN, 403, None, 502, "server_error", None),
    ],
)
def test_who_is_to_come_back_and_who_is_not(
    code: ErrorCode, theirs: int, wait: int | None, status: int, kind: str, retry_after: int | None
) -> None:
    refusal = to_api_error(VerifierRefused(code, "because of this", theirs, retry_after=wait))
    assert (refusal.status, refusal.body.error.type, refusal.retry_after) == (status, kind, retry_after)
    assert refusal.body.error.code == code
    assert "because of this" in refusal.body.error.message
