"""Durable file writes, and a lock for a directory that several processes use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.protocol.errors import InputError

LOCK_NAME, SCRATCH_SUFFIX = ".lock", ".new"
# How long `lock_directory` waits for the current holder. Chosen: holders write one small file.
LOCK_TIMEOUT_SECONDS = 2.0


@contextlib.contextmanager
def os_errors_as_input_errors(path: Path) -> Iterator[None]:
    """Raise InputError instead of what fails when a user's `path` is read or examined inside."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; correct the path, or its permissions") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not a path: {error}") from None


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, contents: bytes, mode: int = 0o600) -> None:
    """Replace the file at `path` completely or not at all; on return it is on the disk. Raises OSError.

    There must be one writer at a time (see `lock_directory`): the scratch file has a fixed name.
    """
    scratch = path.with_suffix(SCRATCH_SUFFIX)
    try:
        scratch.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(descriptor)
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def lock_directory(directory: Path, mode: int = 0o700) -> Iterator[None]:
    """Hold an exclusive lock on `directory`, against other processes and threads; create it if it is missing.

    Raises OSError, of which TimeoutError if the lock is not free within LOCK_TIMEOUT_SECONDS.
    """
    directory.mkdir(mode=mode, parents=True, exist_ok=True)
    # The kernel releases the lock when the process ends, even if it is killed.
    lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode & 0o666)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {directory / LOCK_NAME} for too long") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
