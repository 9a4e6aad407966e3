"""Why a verifier cannot be reached: what failed below the protocol, told apart, each with what to do about it."""

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

import httpx

# A board without a clock of its own begins in 1970, or where it was switched off; never before this was written.
WRITTEN = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
# Where captive portals listen in; and how long one look may take.
CLEAR_PORT = 80
LOOK_SECONDS = 3.0
# By how many seconds a clock may be off before certificates are doubtful.
CLOCK_SLACK = 3600.0
# OpenSSL's verdict on a certificate of the future.
NOT_YET_VALID = 9


class Fault(enum.StrEnum):
    """What failed; also the code that programs are told."""

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
    Fault.DNS: "its name is not found; is the network up, is the name right?",
    Fault.REFUSED: "nobody listens there; is it running, is the port right?",
    Fault.NO_ROUTE: "there is no way there; is the network up?",
    Fault.TIMED_OUT: "is it running, is the link up?",
    Fault.BROKEN: "something cuts or changes its answers; if this lasts, is the URL a verifier's?",
    Fault.UNAVAILABLE: "it is there, and cannot answer now",
    Fault.TLS: "it does not prove to be who it should be: its certificate, or --ca-file, is wrong",
    Fault.CERTIFICATE: "it takes nobody without a certificate that it trusts: --client-certificate and --client-key",
    Fault.CLOCK: "this board's clock is wrong, so no certificate can be checked: `timedatectl` shows it, NTP sets it",
    Fault.PORTAL: "a captive portal is in between: open any page in a browser on this network and log in",
}
# Another attempt at once cannot better these.
FIRM = {
    *(Fault.TIMED_OUT, Fault.DNS, Fault.REFUSED, Fault.NO_ROUTE),
    *(Fault.TLS, Fault.CERTIFICATE, Fault.CLOCK, Fault.PORTAL),
}
# What OpenSSL calls the alerts of a peer that does not like our certificate.
CERTIFICATE_ALERTS = (
    "CERTIFICATE_REQUIRED",
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "ACCESS_DENIED",
)


class LinkFailure(Exception):
    """An attempt that failed below the protocol; another one may be better.

    Attributes:
        fault: what failed.
    """

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class BrokenAnswer(LinkFailure):
    """The answer ended in mid-message, or is not what a verifier says."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Fault.BROKEN)


def failure_of(error: Exception) -> LinkFailure:
    """What httpx and the libraries below it report, told apart."""
    causes = list(_causes(error))
    words = str(causes[-1]) or type(causes[-1]).__name__
    # Once connected, what TLS complains of is what the link did to its records.
    shaken = isinstance(error, httpx.ConnectError) and any(isinstance(cause, ssl.SSLError) for cause in causes)
    fault = next(filter(None, map(_fault_of, causes)), Fault.TLS if shaken else Fault.BROKEN)
    return LinkFailure(words, fault)


def portal_of(response: httpx.Response) -> LinkFailure | None:
    """A captive portal's answer is a page, or a way to one, where only a verifier's messages should be."""
    page = response.headers.get("content-type", "").startswith("text/html")
    if response.status_code == 511 or response.is_redirect or (page and response.is_success):
        return LinkFailure(f"{response.url} answered {response.status_code} with a page", Fault.PORTAL)
    return None


async def look_closer(host: str) -> Fault | None:
    """Why TLS with `host` may have failed, asked in clear: nothing is sent but a request for nothing.

    Returns:
        CLOCK, PORTAL, or None where nothing better than TLS is known.
    """
    if time.time() < WRITTEN.timestamp():
        return Fault.CLOCK
    try:
        async with httpx.AsyncClient(timeout=LOOK_SECONDS) as client:
            response = await client.head(f"http://{host}:{CLEAR_PORT}/")
    except httpx.HTTPError:
        return None
    elsewhere = response.is_redirect and httpx.URL(response.headers.get("location", "")).host not in ("", host)
    if response.status_code == 511 or elsewhere:
        return Fault.PORTAL
    try:
        theirs = email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
    return Fault.CLOCK if abs(theirs - time.time()) > CLOCK_SLACK else None


async def look_at_alert(host: str, port: int, trust: ssl.SSLContext | bool) -> Fault | None:
    """Why connections with `host` may break as soon as they are made: TLS says it to whoever writes nothing.

    Returns:
        CERTIFICATE, or None where nothing is known.
    """
    context = trust if isinstance(trust, ssl.SSLContext) else httpx.create_ssl_context()
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                await reader.read(1)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return Fault.CERTIFICATE if _fault_of(error) == Fault.CERTIFICATE else None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what caused it, and so on to the root."""
    while error is not None:
        yield error
        several = getattr(error, "exceptions", None)
        error = error.__cause__ or error.__context__ or (several[0] if several else None)


def _fault_of(error: BaseException) -> Fault | None:
    if isinstance(error, socket.gaierror):
        return Fault.DNS
    if isinstance(error, ssl.SSLCertVerificationError):
        early = error.verify_code == NOT_YET_VALID
        return Fault.CLOCK if early or time.time() < WRITTEN.timestamp() else Fault.TLS
    if isinstance(error, ssl.SSLError) and (error.reason or "").endswith(CERTIFICATE_ALERTS):
        return Fault.CERTIFICATE
    if isinstance(error, ConnectionRefusedError):
        return Fault.REFUSED
    if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
        return Fault.NO_ROUTE
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        return Fault.TIMED_OUT
    return None
