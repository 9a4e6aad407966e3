"""A child process that is told what to do: one line of JSON each way, and the answer means that it is done."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class Controlled:
    """A process that takes orders on its standard input; it ends when that is closed, so it never outlives us.

    Attributes:
        process: the child.
    """

    def __init__(self, command: list[str], **options: Any) -> None:
        """`options` are those of `subprocess.Popen`."""
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    def order(self, what: msgspec.Struct, answer: type[T]) -> T:
        """Raises RuntimeError if the child is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(msgspec.json.encode(what) + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait(5)}")
        return msgspec.json.decode(line, type=answer)

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
