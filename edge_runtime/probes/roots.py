"""Where probes read: files below roots that can be moved, programs that may be absent, and errors that are survived."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_runtime.protocol.errors import FlexSpecError

T = TypeVar("T")

# Seconds that a program may take.
PROGRAM_SECONDS = 1.0
# No file that a probe reads is longer; a router's routing table may be.
LONGEST = 1 << 20
# What the kernel answers where there is no such sensor, or one without a value at the moment: a network interface that
# is down has no speed (EINVAL), a battery that is away no charge (ENODEV, ENODATA).
NO_DATA = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENODEV,
    errno.ENODATA,
    errno.ENXIO,
    errno.EINVAL,
    errno.EAGAIN,
    errno.EOPNOTSUPP,
}
# `iw` is in sbin, which a user's PATH may lack.
PROGRAM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)


class ProbeError(FlexSpecError):
    """A file or program that is there, and does not say what it should. A `Reader` counts it and goes on."""


Run = Callable[[tuple[str, ...]], bytes | None]


def run_program(arguments: tuple[str, ...]) -> bytes | None:
    """What a program prints; None if it does not exist or exits non-zero, which for `iw`, `nmcli` and `mmcli` means
    that nothing is known, not that there is no link.

    Raises:
        ProbeError: it cannot be started, or does not end within a second.
    """
    program = shutil.which(arguments[0], path=PROGRAM_PATH)
    if program is None:
        return None
    try:
        done = subprocess.run(
            (program, *arguments[1:]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROGRAM_SECONDS,
            # What programs print is parsed, so it must not be translated.
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(
            f"{' '.join(arguments)}: no answer within {PROGRAM_SECONDS:g} s; does it answer by hand?"
        ) from None
    except OSError as error:
        raise ProbeError(f"{' '.join(arguments)}: cannot be started: {error.strerror}") from None
    return done.stdout if done.returncode == 0 else None


class Recorded:
    """Answers programs from files instead of running them: `vcgencmd get_throttled` from `vcgencmd_get_throttled`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, arguments: tuple[str, ...]) -> bytes | None:
        """The recorded output; None where nothing is recorded. Raises ProbeError."""
        return read_bytes(f"{self._directory}/{'_'.join(arguments)}")


class Roots(msgspec.Struct, frozen=True):
    """What stands for /sys and /proc, and what runs programs."""

    sysfs: Path = Path("/sys")
    procfs: Path = Path("/proc")
    run: Run = run_program

    @property
    def here(self) -> bool:
        """Whether these are this machine's own, so that a library may be asked that knows no other."""
        return (self.sysfs, self.procfs) == (Path("/sys"), Path("/proc"))


class Reader:
    """Reads for one probe, once. What is absent is None; what is broken is None too, and noted in `errors`.

    Attributes:
        roots, sysfs, procfs: where it reads.
        now: seconds on a clock that only goes forward, for what needs two readings.
        errors: what was broken.
    """

    def __init__(self, roots: Roots, now: float) -> None:
        self.roots = roots
        self.sysfs = str(roots.sysfs)
        self.procfs = str(roots.procfs)
        self.now = now
        self.errors: list[str] = []

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        return os.access(path, os.F_OK)

    def names(self, directory: str, prefix: str = "") -> list[str]:
        """Names in a directory that start with `prefix`, `hwmon2` before `hwmon10`; none if it does not exist."""
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries if entry.name.startswith(prefix)]
        except OSError as error:
            if error.errno not in NO_DATA:
                self.errors.append(_message(directory, error))
            return []
        return sorted(names, key=lambda name: (len(name), name))

    def text(self, path: str) -> str | None:
        """What a file says, without white space and NUL around it."""
        return self._try(lambda: _text(path, read_bytes(path)))

    def integer(self, path: str) -> int | None:
        """The whole number in a file."""
        return self.parsed(path, integer)

    def parsed(self, path: str, parse: Callable[[str], T]) -> T | None:
        """What `parse` makes of a file."""
        return self._try(lambda: _parsed(path, read_bytes(path), parse))

    def program(self, parse: Callable[[str], T], *arguments: str) -> T | None:
        """What `parse` makes of a program's output."""
        return self._try(lambda: _parsed(" ".join(arguments), self.roots.run(arguments), parse))

    def _try(self, read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except ProbeError as error:
            self.errors.append(str(error))
            return None


def read_bytes(path: str) -> bytes | None:
    """A file's bytes; None if there is none, or the kernel has no value for it. Raises ProbeError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # The kernel makes a /proc table up piece by piece; a sysfs file comes in one.
            content = os.read(handle, 1 << 16)
            while len(content) <= LONGEST and (more := os.read(handle, 1 << 16) if content else b""):
                content += more
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in NO_DATA:
            return None
        raise ProbeError(_message(path, error)) from None
    if len(content) > LONGEST:
        raise ProbeError(f"{path}: longer than {LONGEST} bytes, which this probe does not read")
    return content


def integer(text: str) -> int:
    """A whole number in decimal. Raises ProbeError."""
    if not _INTEGER.fullmatch(text):
        raise ProbeError(f"not a whole number: {shown(text)}")
    return int(text)


def decimal(text: str) -> float:
    """A number with or without a fraction. Raises ProbeError."""
    if not _DECIMAL.fullmatch(text):
        raise ProbeError(f"not a number: {shown(text)}")
    return float(text)


def shown(text: str) -> str:
    """The start of a text, for an error message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _text(source: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    try:
        return content.decode().strip(" \t\n\0")
    except UnicodeDecodeError:
        raise ProbeError(f"{source}: not text: {content[:20]!r}") from None


def _parsed(source: str, content: bytes | None, parse: Callable[[str], T]) -> T | None:
    text = _text(source, content)
    if text is None:
        return None
    try:
        return parse(text)
    except ProbeError as error:
        raise ProbeError(f"{source}: {error}") from None


def _message(path: str, error: OSError) -> str:
    hint = "; run as root, or let this user read it" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return f"{path}: {error.strerror}{hint}"
