"""Directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from edge_runtime.protocol.errors import InputError


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `output` at the end; if the block raises, it is removed.

    It is a hidden sibling of `output`, so that renaming it is atomic. Files of an interrupted run are removed first.

    Raises:
        InputError: `output` exists, another process is making it, or the disk is full.
    """
    if output.exists():
        raise InputError(f"{output} exists already; remove it or choose another --output")
    work = output.with_name(f".{output.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from None
    try:
        # The kernel releases the lock when the process ends, even if it is killed.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"another process is making {output}; wait for it or choose another --output") from None
    try:
        _remove_contents(work)
        yield work
        work.rename(output)
    except (OSError, SafetensorError) as error:
        # Libraries report a full disk as "n requested and m written", so state the free space.
        free = f"{shutil.disk_usage(work).free / 1e6:.0f} MB are free there"
        raise InputError(
            f"cannot make {output}: {error} ({free}); nothing was left behind: fix the cause and try again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _remove_contents(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
