"""Conversion of verifier errors to errors of the service's API."""

from __future__ import annotations

import pytest

from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode
from edge_runtime.service.errors import to_api_error


@pytest.mark.parametrize(
    ("code", "verifier_status", "verifier_retry_after", "status", "kind", "retry_after"),
    [
        (ErrorCode.RATE_LIMITED, 429, 7, 429, "rate_limit_error", 7),
        (ErrorCode.RATE_LIMITED, 429, None, 429, "rate_limit_error", 1),
        (ErrorCode.DRAINING, 503, 1, 503, "server_error", 1),
        (ErrorCode.OVERLOADED, 503, 2, 503, "server_error", 2),
        (ErrorCode.UNAUTHORIZED, 401, None, 502, "server_error", None),
        (ErrorCode.FORBIDDEN, 403, None, 502, "server_error", None),
    ],
)
def test_verifier_errors_keep_their_code_and_retry_after(
    code: ErrorCode,
    verifier_status: int,
    verifier_retry_after: int | None,
    status: int,
    kind: str,
    retry_after: int | None,
) -> None:
    refused = VerifierRefused(code, "because of this", verifier_status, retry_after=verifier_retry_after)
    error = to_api_error(refused)
    assert (error.status, error.body.error.type, error.retry_after) == (status, kind, retry_after)
    assert error.body.error.code == code
    assert "because of this" in error.body.error.message
