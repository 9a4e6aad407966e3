"""Faults below the protocol: classifies why a verifier cannot be reached, each fault with its remedy."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import enum
import errno
import socket
import ssl
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx

from edge_runtime.common.http_client import UNCOMPRESSED
from edge_runtime.verifier.http_transport import trust_nobody

# A board without a real-time clock starts in 1970 or at its last shutdown. A clock before this date, when the code was
# written, is certainly wrong.
EARLIEST_PLAUSIBLE_TIME = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
# Captive portals intercept plain HTTP. Time limit of one diagnostic probe, chosen.
HTTP_PORT = 80
PROBE_SECONDS = 3.0
# Clock error above which certificate validity checks are unreliable, chosen.
MAX_CLOCK_ERROR_SECONDS = 3600.0
# OpenSSL: X509_V_ERR_CERT_NOT_YET_VALID.
CERT_NOT_YET_VALID = 9


class Fault(enum.StrEnum):
    """What failed; the value is the error code that clients see."""

    DNS = "dns_failure"
    REFUSED = "connection_refused"
    NO_ROUTE = "network_unreachable"
    TIMED_OUT = "timed_out"
    BROKEN = "broken_answer"
    UNAVAILABLE = "verifier_unavailable"
    TLS = "tls_failure"
    CERTIFICATE = "client_certificate"
    CLOCK = "clock_wrong"
    PORTAL = "captive_portal"


HINTS = {
    Fault.DNS: "its name does not resolve; is the network up, is the name right?",
    Fault.REFUSED: "nothing listens on that port; is it running, is the port right?",
    Fault.NO_ROUTE: "there is no route to it; is the network up?",
    Fault.TIMED_OUT: "is it running, is the link up?",
    Fault.BROKEN: "its answers arrive truncated or altered; if this persists, is this the URL of a verifier?",
    Fault.UNAVAILABLE: "it is running but cannot answer now",
    Fault.TLS: "its certificate is not trusted: the certificate or --ca-file is wrong",
    Fault.CERTIFICATE: "it requires a client certificate that it trusts: --client-certificate and --client-key",
    Fault.CLOCK: "this board's clock is wrong, so no certificate can be checked: `timedatectl` shows it, NTP sets it",
    Fault.PORTAL: "a captive portal intercepts the connection: open any page in a browser on this network and log in",
}
# The closest errno of each fault: systemd takes only a number, and shows it as the service's error.
ERRNOS: dict[str, int] = {
    Fault.DNS: errno.EHOSTUNREACH,
    Fault.REFUSED: errno.ECONNREFUSED,
    Fault.NO_ROUTE: errno.ENETUNREACH,
    Fault.TIMED_OUT: errno.ETIMEDOUT,
    Fault.BROKEN: errno.EBADMSG,
    Fault.UNAVAILABLE: errno.EAGAIN,
    Fault.TLS: errno.EKEYREJECTED,
    Fault.CERTIFICATE: errno.EKEYREJECTED,
    Fault.CLOCK: errno.EKEYEXPIRED,
    Fault.PORTAL: errno.ECONNABORTED,
}
# An immediate retry cannot help.
PERSISTENT = {
    *(Fault.TIMED_OUT, Fault.DNS, Fault.REFUSED, Fault.NO_ROUTE),
    *(Fault.TLS, Fault.CERTIFICATE, Fault.CLOCK, Fault.PORTAL),
}
# OpenSSL reasons of the TLS alerts with which a peer rejects our certificate.
CERTIFICATE_ALERTS = (
    "CERTIFICATE_REQUIRED",
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "ACCESS_DENIED",
)


class LinkProblem(NamedTuple):
    """Why a verifier cannot be used.

    Attributes:
        code: a `Fault`, or the `protocol.messages.ErrorCode` of a refusal.
        reason: the URL, the cause, and what to do.
        since: Unix time at which it began.
    """

    code: str
    reason: str
    since: float

    @property
    def errno(self) -> int:
        """The errno that is closest to the cause."""
        return ERRNOS.get(self.code, errno.EACCES)


class LinkState(NamedTuple):
    """Whether a verifier can be reached, as far as the last attempts tell.

    Attributes:
        reachable: None before the first attempt.
        problem: of the preferred verifier, if none is reachable.
    """

    reachable: bool | None
    problem: LinkProblem | None = None

    @property
    def reason(self) -> str:
        """Why no verifier can be used, and since when; empty while one can, or if none was tried."""
        if self.problem is None:
            return ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.problem.since))
        return f"no verifier can be used since {since}: {self.problem.reason}"


class LinkFailure(Exception):
    """An attempt that failed below the protocol; a retry may succeed."""

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class BrokenAnswer(LinkFailure):
    """The answer was truncated, or is not a valid message of a verifier."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Fault.BROKEN)


def failure_of(error: Exception) -> LinkFailure:
    """Classify an exception of httpx or of the libraries below it."""
    causes = list(_causes(error))
    message = str(causes[-1]) or type(causes[-1]).__name__
    # After the handshake, a TLS error means that the link corrupted records.
    in_handshake = isinstance(error, httpx.ConnectError) and any(isinstance(cause, ssl.SSLError) for cause in causes)
    fault = next(filter(None, map(_fault_of, causes)), Fault.TLS if in_handshake else Fault.BROKEN)
    return LinkFailure(message, fault)


def portal_of(response: httpx.Response) -> LinkFailure | None:
    """A failure if the response is a captive portal's: a web page, or a redirect to one."""
    page = response.headers.get("content-type", "").startswith("text/html")
    if response.status_code == 511 or response.is_redirect or (page and response.is_success):
        return LinkFailure(f"{response.url} answered {response.status_code} with a page", Fault.PORTAL)
    return None


async def probe_over_http(host: str) -> Fault | None:
    """Diagnose a failed TLS handshake with `host` by a plain HTTP HEAD request that carries no data.

    Returns:
        CLOCK, PORTAL, or None if the cause remains unknown.
    """
    if time.time() < EARLIEST_PLAUSIBLE_TIME.timestamp():
        return Fault.CLOCK
    try:
        async with (
            # httpx limits each piece of an answer alone.
            asyncio.timeout(2 * PROBE_SECONDS),
            httpx.AsyncClient(
                verify=trust_nobody(), timeout=PROBE_SECONDS, trust_env=False, headers=UNCOMPRESSED
            ) as client,
            client.stream("HEAD", f"http://{host}:{HTTP_PORT}/") as response,
        ):
            pass
    except (httpx.HTTPError, TimeoutError):
        return None
    redirected = response.is_redirect and httpx.URL(response.headers.get("location", "")).host not in ("", host)
    if response.status_code == 511 or redirected:
        return Fault.PORTAL
    try:
        server_time = email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
    return Fault.CLOCK if abs(server_time - time.time()) > MAX_CLOCK_ERROR_SECONDS else None


async def probe_tls_alert(host: str, port: int, trust: ssl.SSLContext) -> Fault | None:
    """Diagnose connections that break right after the handshake: connect, send nothing and read the TLS alert.

    Returns:
        CERTIFICATE, or None if the cause remains unknown.
    """
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, ssl=trust)
            try:
                await reader.read(1)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return Fault.CERTIFICATE if _fault_of(error) == Fault.CERTIFICATE else None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes, down to the root."""
    while error is not None:
        yield error
        group = getattr(error, "exceptions", None)
        error = error.__cause__ or error.__context__ or (group[0] if group else None)


def _fault_of(error: BaseException) -> Fault | None:
    if isinstance(error, socket.gaierror):
        return Fault.DNS
    if isinstance(error, ssl.SSLCertVerificationError):
        not_yet_valid = error.verify_code == CERT_NOT_YET_VALID
        return Fault.CLOCK if not_yet_valid or time.time() < EARLIEST_PLAUSIBLE_TIME.timestamp() else Fault.TLS
    if isinstance(error, ssl.SSLError) and (error.reason or "").endswith(CERTIFICATE_ALERTS):
        return Fault.CERTIFICATE
    if isinstance(error, ConnectionRefusedError):
        return Fault.REFUSED
    if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
        return Fault.NO_ROUTE
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        return Fault.TIMED_OUT
    return None
