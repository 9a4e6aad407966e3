"""Checkpoints that are converted once and kept in a cache: GGUF files.

Without PyTorch, so that what is in the cache already is found at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from edge_runtime.protocol.errors import TargetError

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
# Part of the cached directory's name: raise it when the conversion changes.
CONVERTER_VERSION = 1


def is_gguf(path: Path) -> bool:
    """Whether there is a GGUF file at `path`."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def resolve_checkpoint(path: Path) -> Path:
    """The directory of the checkpoint at `path`: the path itself, or that of a converted GGUF file.

    A GGUF file is converted at the first call; the directory's name contains the hash of the file.

    Raises:
        TargetError: the file cannot be converted.
    """
    if not is_gguf(path):
        return path
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    directory = cache_directory(os.environ) / f"{path.stem}-{digest[:12]}-{CONVERTER_VERSION}"
    with _locked(directory):
        if not directory.is_dir():
            from cloud_verifier.model.gguf import convert_gguf

            log.warning("converting %s into %s, once", path, directory)
            convert_gguf(path, directory)
    return directory


def cache_directory(environ: Mapping[str, str], name: str = "gguf") -> Path:
    """A directory of files that can be made again, converted ones by default.

    It is in systemd's $CACHE_DIRECTORY, else in $XDG_CACHE_HOME (default: ~/.cache).

    Raises:
        TargetError: none of them is set.
    """
    service = environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if service:
        return Path(service) / name
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "flexspec" / name
    if not environ.get("HOME"):
        raise TargetError("there is no place for converted GGUF files: set $XDG_CACHE_HOME")
    return Path(environ["HOME"], ".cache", "flexspec", name)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock of `directory`'s name, so that of several processes one converts and the others wait."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.with_name(f".{directory.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise TargetError(f"cannot write the cache of converted GGUF files: {error}; set $XDG_CACHE_HOME") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
