"""The access log: openings and errors at level info, all other requests at debug. It has no tokens of a text."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.requests import Request

from edge_runtime.common import logs
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

# Accepted values of the header x-request-id.
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")


def request_id(request: Request) -> str:
    """The client's own id of the request; empty if there is none, or if it is unfit for a log."""
    header: str = request.headers.get("x-request-id", "")
    return header if REQUEST_ID.fullmatch(header) else ""


def log_request(request: Request, handler: str, status: int, code: str, seconds: float) -> None:
    """Log a request. `code` is its error code, or empty. Successful rounds are logged at debug level only."""
    routine = code == ErrorCode.ROUND_VOID or (not code and handler != "open")
    level = logging.DEBUG if routine else logging.INFO
    if not log.isEnabledFor(level):
        return
    logged_id = request_id(request) or secrets.token_hex(8)
    principal = getattr(request.state, "principal", "")
    # Only the beginning: without tokens, the whole id grants access to the session.
    session = getattr(request.state, "session", "")[:4]
    fields = {
        "FLEXSPEC_REQUEST_ID": logged_id,
        "FLEXSPEC_PRINCIPAL": principal,
        "FLEXSPEC_SESSION": session,
        "FLEXSPEC_STATUS": status,
        "FLEXSPEC_CODE": code,
        "FLEXSPEC_SECONDS": round(seconds, 4),
    }
    log.log(
        level,
        "%s: %d%s in %.1f ms, request %s%s%s",
        handler,
        status,
        f" {code}" if code else "",
        1e3 * seconds,
        logged_id,
        f" of {principal}" if principal else "",
        f", session {session}..." if session else "",
        extra={logs.EXTRA_FIELDS: fields},
    )
