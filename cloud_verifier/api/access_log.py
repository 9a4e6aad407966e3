"""One line in the log for each request. Never a token of a text in it."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.requests import Request

from edge_runtime.common import logs
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

# A client's own name of a request, to be found in the log; others get one of ours.
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")


def request_id(request: Request) -> str:
    """What the client calls its request; empty where it does not say, or nothing that a log should hold."""
    named: str = request.headers.get("x-request-id", "")
    return named if REQUEST_ID.fullmatch(named) else ""


def log_request(request: Request, what: str, status: int, code: str, seconds: float) -> None:
    """`code`: of a refusal, else empty. Rounds that went well are only for those who look for faults."""
    usual = code == ErrorCode.ROUND_VOID or (not code and what != "open")
    level = logging.DEBUG if usual else logging.INFO
    if not log.isEnabledFor(level):
        return
    named = request_id(request) or secrets.token_hex(8)
    principal = getattr(request.state, "principal", "")
    # The beginning alone: the whole id is as good as a key where nobody is asked for a token.
    session = getattr(request.state, "session", "")[:4]
    fields = {
        "FLEXSPEC_REQUEST_ID": named,
        "FLEXSPEC_PRINCIPAL": principal,
        "FLEXSPEC_SESSION": session,
        "FLEXSPEC_STATUS": status,
        "FLEXSPEC_CODE": code,
        "FLEXSPEC_SECONDS": round(seconds, 4),
    }
    log.log(
        level,
        "%s: %d%s in %.1f ms, request %s%s%s",
        what,
        status,
        f" {code}" if code else "",
        1e3 * seconds,
        named,
        f" of {principal}" if principal else "",
        f", session {session}..." if session else "",
        extra={logs.FIELDS: fields},
    )
