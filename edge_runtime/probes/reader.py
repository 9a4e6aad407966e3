"""The input of probes: files below replaceable roots, and programs that may be absent; errors are recorded."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Container
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_runtime.protocol.errors import FlexSpecError

T = TypeVar("T")

# Time limit for a program (iw, nmcli, mmcli, vcgencmd), chosen.
PROGRAM_SECONDS = 1.0
# Upper bound of a file, in bytes. Only the routing table of a router exceeds it.
MAX_FILE_BYTES = 1 << 20
# errno of a sensor that does not exist or has no value at the moment: a network interface that is down has no speed
# (EINVAL), a removed battery no charge (ENODEV, ENODATA).
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
# Characters of a failed program's output that its error message shows. Chosen: a line of a terminal.
MAX_MESSAGE = 120
# `iw` is installed in sbin, which a user's PATH may lack.
PROGRAM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)


class ProbeError(FlexSpecError):
    """A file or program exists but its content cannot be parsed. A `Reader` records it and continues."""


class ProgramFailed(ProbeError):
    """A program exists but exits non-zero, for instance because it may not open its device."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


Run = Callable[[tuple[str, ...]], bytes | None]


def run_program(arguments: tuple[str, ...]) -> bytes | None:
    """Standard output of a program; None if it does not exist.

    Raises:
        ProgramFailed: it exits non-zero; the message has the first line of what it printed.
        ProbeError: it cannot be started, or does not end within PROGRAM_SECONDS.
    """
    program = shutil.which(arguments[0], path=PROGRAM_PATH)
    if program is None:
        return None
    try:
        done = subprocess.run(
            (program, *arguments[1:]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROGRAM_SECONDS,
            # The output is parsed, so it must not be translated.
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(
            f"{' '.join(arguments)}: no answer within {PROGRAM_SECONDS:g} s; does it answer in a terminal?"
        ) from None
    except OSError as error:
        raise ProbeError(f"{' '.join(arguments)}: cannot be started: {error.strerror}") from None
    if done.returncode:
        # `vcgencmd` prints its errors to standard output.
        printed = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace").partition("\n")[0]
        raise ProgramFailed(
            f"{' '.join(arguments)}: exit code {done.returncode}: {printed[:MAX_MESSAGE] or 'no message'}",
            done.returncode,
        )
    return done.stdout


class RecordedPrograms:
    """Replaces programs by recorded output: `vcgencmd get_throttled` is read from the file `vcgencmd_get_throttled`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, arguments: tuple[str, ...]) -> bytes | None:
        """The recorded output; None if there is none. Raises ProbeError."""
        return read_bytes(f"{self._directory}/{'_'.join(arguments)}")


class Roots(msgspec.Struct, frozen=True):
    """Replacements for /sys and /proc, and the function that runs programs."""

    sysfs: Path = Path("/sys")
    procfs: Path = Path("/proc")
    run: Run = run_program

    @property
    def is_this_machine(self) -> bool:
        """Whether these are the real roots, so that a library that reads only those can be used."""
        return (self.sysfs, self.procfs) == (Path("/sys"), Path("/proc"))


class Reader:
    """File access for one reading of one probe. Absent data is None; broken data is None too, and recorded in `errors`.

    Attributes:
        roots, sysfs, procfs: where to read.
        now: seconds of a monotonic clock, for rates between two readings.
        errors: messages of what could not be parsed.
    """

    def __init__(self, roots: Roots, now: float) -> None:
        self.roots = roots
        self.sysfs = str(roots.sysfs)
        self.procfs = str(roots.procfs)
        self.now = now
        self.errors: list[str] = []

    def exists(self, path: str) -> bool:
        """Whether the file or directory exists."""
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
        """Content of a file, stripped of white space and NUL."""
        return self._try(lambda: _text(path, read_bytes(path)))

    def integer(self, path: str) -> int | None:
        """The whole number in a file."""
        return self.parsed(path, integer)

    def parsed(self, path: str, parse: Callable[[str], T]) -> T | None:
        """Content of a file, parsed by `parse`."""
        return self._try(lambda: _parsed(path, read_bytes(path), parse))

    def program(self, parse: Callable[[str], T], *arguments: str, no_data: Container[int] = ()) -> T | None:
        """Output of a program, parsed by `parse`; None if it is not installed, or fails, which is recorded.

        Args:
            no_data: exit codes by which it says that there is nothing to report, which is no error.
        """

        def run() -> bytes | None:
            try:
                return self.roots.run(arguments)
            except ProgramFailed as failure:
                if failure.exit_code in no_data:
                    return None
                raise

        return self._try(lambda: _parsed(" ".join(arguments), run(), parse))

    def _try(self, read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except ProbeError as error:
            self.errors.append(str(error))
            return None


def read_bytes(path: str) -> bytes | None:
    """Content of a file; None if it does not exist or the kernel has no value for it. Raises ProbeError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # A /proc table is produced piece by piece; a sysfs file arrives in one read.
            content = os.read(handle, 1 << 16)
            while len(content) <= MAX_FILE_BYTES and (more := os.read(handle, 1 << 16) if content else b""):
                content += more
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in NO_DATA:
            return None
        raise ProbeError(_message(path, error)) from None
    if len(content) > MAX_FILE_BYTES:
        raise ProbeError(f"{path}: longer than {MAX_FILE_BYTES} bytes, too long for a probe")
    return content


def integer(text: str) -> int:
    """Parse a decimal integer. Raises ProbeError."""
    if not _INTEGER.fullmatch(text):
        raise ProbeError(f"not a whole number: {excerpt(text)}")
    return int(text)


def decimal(text: str) -> float:
    """Parse a decimal number. Raises ProbeError."""
    if not _DECIMAL.fullmatch(text):
        raise ProbeError(f"not a number: {excerpt(text)}")
    return float(text)


def within(value: float | None, low: float, high: float) -> float | None:
    """Return `value` if it lies in [low, high], else None: drivers report an unknown value as an impossible one."""
    return float(value) if value is not None and low <= value <= high else None


def excerpt(text: str) -> str:
    """The start of a text, quoted, for an error message."""
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
