"""Runs a tensor-parallel group: a process for each GPU, the first of which leads and serves.

torchrun does that, too, and sets the same variables. But it passes a SIGTERM to all processes, so that rounds in
progress are lost, and then fails. Here the leader alone gets signals, and the group ends as the leader ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The leader tells the followers to end before it ends itself. Chosen: freeing a GPU's memory takes seconds.
LAST_SECONDS = 30.0
# More than a message to systemd has.
NOTIFICATION_BYTES = 4096
# Of Linux's prctl(2): the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1


def run_group(command: Sequence[str], size: int) -> int:
    """Run `command` in `size` processes with the variables of torchrun, until the leader ends.

    Returns the leader's exit code, or 1 if another process failed before.
    """
    port, notifications = _find_port(), _relay_notifications()
    processes: list[subprocess.Popen[bytes]] = []
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        for rank in range(size):
            process = subprocess.Popen(
                command,
                env=_make_environment(rank, size, port, notifications),
                # Of a session of its own, so that Ctrl-C in a terminal reaches the leader through us only.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            processes.append(process)
            threading.Thread(target=_wait, args=(rank, process, ended), daemon=True).start()
        for number in FORWARDED_SIGNALS:
            signal.signal(number, lambda number, _: processes[0].send_signal(number))
        rank = ended.get()
        failure = processes[rank].returncode
        if failure and rank:
            log.critical("the process of GPU %d ended with %d, so all end", rank, failure)
            return 1
        if not failure:
            deadline = time.monotonic() + LAST_SECONDS
            with contextlib.suppress(queue.Empty):
                for _ in range(size - 1):
                    ended.get(timeout=max(0.0, deadline - time.monotonic()))
        code = processes[0].poll()
        # As a shell reports a process that a signal has ended.
        return 1 if code is None else code if code >= 0 else 128 - code
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def ignore_signals() -> None:
    """Let a follower end only as the leader says: signals to a whole group reach it, too."""
    for number in FORWARDED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _wait(rank: int, process: subprocess.Popen[bytes], ended: queue.SimpleQueue[int]) -> None:
    process.wait()
    ended.put(rank)


def _find_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _relay_notifications() -> str | None:
    """Pass on to systemd what the leader tells it: it listens to the process that it has started.

    Returns the address of the leader's socket; None without systemd.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return None
    inside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    # The kernel chooses an abstract name.
    inside.bind("")

    def relay() -> None:
        with inside, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside:
            manager = f"\0{address[1:]}" if address.startswith("@") else address
            while True:
                message = inside.recv(NOTIFICATION_BYTES)
                # systemd does not listen while it restarts itself.
                with contextlib.suppress(OSError):
                    outside.sendto(message, manager)

    threading.Thread(target=relay, daemon=True).start()
    name: bytes = inside.getsockname()
    return name.decode().replace("\0", "@", 1)


def _make_environment(rank: int, size: int, port: int, notifications: str | None) -> dict[str, str]:
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    environment = os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # systemd names the process that it started: the leader serves its watchdog in that one's place.
    for name in ("WATCHDOG_PID", "NOTIFY_SOCKET"):
        environment.pop(name, None)
    if notifications and not rank:
        environment["NOTIFY_SOCKET"] = notifications
    return environment


def _end_with_parent() -> None:
    """Let the calling process be killed when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
