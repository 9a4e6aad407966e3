"""What must have reached the disk before anybody counts on it, and who may change it meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK, SCRATCH = ".lock", ".new"
# For another process to have finished with a directory.
PATIENCE_SECONDS = 2.0


def sync(path: Path) -> None:
    """Sees a file's contents, or a directory's names, onto the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, contents: bytes, mode: int = 0o600) -> None:
    """Writes the file anew, whole or not at all; one writer at a time (see `locked`). Raises OSError."""
    scratch = path.with_suffix(SCRATCH)
    try:
        scratch.unlink(missing_ok=True)
        file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(file, "wb") as writing:
            writing.write(contents)
            writing.flush()
            os.fsync(file)
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(directory: Path, mode: int = 0o700) -> Iterator[None]:
    """Keeps other processes and threads from `directory` meanwhile; made if it is missing. Raises OSError."""
    directory.mkdir(mode=mode, parents=True, exist_ok=True)
    # Released by the kernel with the process, however that ends.
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode & 0o666)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {directory / LOCK} for too long") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
