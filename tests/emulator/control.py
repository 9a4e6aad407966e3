"""A child process that executes commands: one line of JSON per command, and one per reply once it has been executed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar

import msgspec

T = TypeVar("T")


@contextlib.contextmanager
def on_time() -> Iterator[None]:
    """Context manager: the calling thread has real-time priority, where that is allowed."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, *before)


def claim_standard_output() -> BinaryIO:
    """Return this process's standard output for its replies; what else it prints goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return replies


class ControlledProcess:
    """A process that reads commands from its standard input.

    It ends when its standard input is closed, so it never outlives its parent.

    Attributes:
        process: the child process.
    """

    def __init__(self, command: list[str], **options: Any) -> None:
        """Start the process; `options` are passed to `subprocess.Popen`."""
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    def send(self, command: msgspec.Struct, reply_type: type[T]) -> T:
        """Send a command and wait for its reply. Raises RuntimeError if the child has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(msgspec.json.encode(command) + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait(5)}")
        return msgspec.json.decode(line, type=reply_type)

    def stop(self) -> None:
        """End the process: close its standard input, and kill it if it is still alive after five seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
