"""What a service tells systemd: that it is ready, what it does, that it lives (sd_notify(3)).

The protocol is one datagram per message. Nothing happens where nobody listens, so services need not ask.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

# Seconds between looks at what there is to tell.
STATUS_SECONDS = 5.0
# How often the watchdog is fed within its time: one message may be late.
FEEDINGS = 3
SEND_SECONDS = 0.5
# What a stalled service says of itself.
STALLED = "stalled: no progress for {:.0f} s, so the watchdog is not fed"


class Notifier:
    """The way to systemd, if it started this process.

    Attributes:
        listening: whether somebody listens.
        watchdog_seconds: within which it must hear of us; None if it does not mind.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the null byte of Linux's abstract names; other kinds of sockets are for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.listening = address.startswith(("@", "/"))
        self.watchdog_seconds = _watchdog_seconds(environ) if self.listening else None
        self._status = ""

    def starting(self, status: str) -> None:
        """Not ready yet, and why."""
        self._tell_status(status)

    def ready(self, status: str) -> None:
        """There are answers from now on, or again."""
        self._status = status
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends that."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._send("STOPPING=1", f"STATUS={status}")

    async def keep_telling(self, status: Callable[[], str], stalled_seconds: Callable[[], float]) -> None:
        """Feeds the watchdog, and tells changes of `status`, until cancelled.

        It runs on the event loop, so a loop that hangs is not fed.

        Args:
            status: one line for people.
            stalled_seconds: for how long the work has made no progress; 0 while it does, or there is none.
        """
        if not self.listening:
            return
        limit = self.watchdog_seconds
        pause = STATUS_SECONDS if limit is None else min(STATUS_SECONDS, limit / FEEDINGS)
        while True:
            stalled = stalled_seconds()
            if limit is None or stalled < limit:
                self._tell_status(status())
                if limit is not None:
                    self._send("WATCHDOG=1")
            else:
                log.error("%s", STALLED.format(stalled))
                self._tell_status(STALLED.format(stalled))
            await asyncio.sleep(pause)

    def _tell_status(self, status: str) -> None:
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def _send(self, *lines: str) -> None:
        if not self.listening:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as telling:
                # A manager that is being restarted does not read: the event loop does not wait long for it.
                telling.settimeout(SEND_SECONDS)
                telling.sendto("\n".join(line.replace("\n", " ") for line in lines).encode(), self._address)
        except OSError as error:
            log.warning("could not tell systemd %s: %s", lines[0], error.strerror)


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Of the watchdog, if it is meant for this process and not for the one that started it."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        seconds = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return seconds if seconds > 0 else None
