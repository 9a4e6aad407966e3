"""Service notifications to systemd: readiness, status and watchdog (sd_notify(3)).

The protocol is one datagram per message. Without a notification socket every method does nothing, so callers need not
check whether systemd started them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

# Longest interval between two checks of the status. Chosen.
STATUS_INTERVAL_SECONDS = 5.0
# Keep-alives within one watchdog timeout. Chosen: one may be late.
KEEPALIVES_PER_TIMEOUT = 3
SEND_TIMEOUT_SECONDS = 0.5
STALLED_STATUS = "stalled: no progress for {:.0f} s, so the watchdog is not fed"


class Notifier:
    """Sends notifications to systemd, if it started this process.

    Attributes:
        enabled: whether there is a notification socket.
        watchdog_seconds: the watchdog's timeout; None without a watchdog.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the null byte of Linux's abstract names. Other kinds of sockets are for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.enabled = address.startswith(("@", "/"))
        self.watchdog_seconds = _watchdog_seconds(environ) if self.enabled else None
        self._status = ""
        self._errno = 0

    def starting(self, status: str) -> None:
        """Report the status of a service that is not ready yet."""
        self._send_status(status)

    def ready(self, status: str) -> None:
        """Report that the service answers requests, after its start or a reload."""
        self._status = status
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Report that the configuration is being reloaded, until `ready` is called."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """Report that the service is shutting down."""
        self._send("STOPPING=1", f"STATUS={status}")

    async def run(
        self, status: Callable[[], str], stalled_seconds: Callable[[], float], errno: Callable[[], int] = int
    ) -> None:
        """Feed the watchdog and report changes of `status` and `errno` until cancelled.

        It runs on the event loop, so that an event loop that hangs stops feeding the watchdog.

        Args:
            status: one line for people.
            stalled_seconds: time since the work last made progress; 0 while it does, or if there is no work.
            errno: why the service cannot do its work although it runs; 0 if it can. `service status` reports it.
        """
        if not self.enabled:
            return
        timeout = self.watchdog_seconds
        interval = STATUS_INTERVAL_SECONDS
        if timeout is not None:
            interval = min(interval, timeout / KEEPALIVES_PER_TIMEOUT)
        while True:
            stalled = stalled_seconds()
            if timeout is None or stalled < timeout:
                self._send_status(status())
                self._send_errno(errno())
                if timeout is not None:
                    self._send("WATCHDOG=1")
            else:
                log.error("%s", STALLED_STATUS.format(stalled))
                self._send_status(STALLED_STATUS.format(stalled))
            await asyncio.sleep(interval)

    def _send_status(self, status: str) -> None:
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def _send_errno(self, number: int) -> None:
        if number != self._errno:
            self._errno = number
            self._send(f"ERRNO={number}")

    def _send(self, *lines: str) -> None:
        if not self.enabled:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify_socket:
                # systemd does not read while it restarts itself; the event loop must not block on it for long.
                notify_socket.settimeout(SEND_TIMEOUT_SECONDS)
                notify_socket.sendto(message, self._address)
        except OSError as error:
            log.warning("could not send %s to systemd: %s", lines[0], error.strerror)


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """The watchdog's timeout, if it is for this process and not for the one that started it."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        seconds = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return seconds if seconds > 0 else None
