"""The n-gram cache on disk: one JSON-lines file for each vocabulary, to which several processes may append.

The first line states the format and the vocabulary; each further line is a text, the latest last. A write cut short by
a kill or a full disk leaves one line that does not parse, and the next text begins on a new line. When the file has
grown too long, its newer half replaces it atomically. A corrupted digit causes a bad draft token and never a wrong
output.

The file holds what users wrote, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_runtime.common.files import SCRATCH_SUFFIX, fsync_path, lock_directory, write_atomically

logger = logging.getLogger(__name__)

STORE_SUFFIX, DAMAGED_SUFFIX = ".jsonl", ".damaged"
# Chosen: some 90,000 tokens, more than the cache holds (`lookup.CACHE_TOKENS`).
MAX_FILE_BYTES = 1 << 19


class StoreHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of the file. `born` is a random id, new whenever the file is created."""

    flexspec_memory: Literal[1]
    vocabulary: str
    born: str


class NgramRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text: the exact target version that verified it, its ids, and the weights of the regression at its end."""

    version: str
    ids: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]
    weights: list[float]


class NgramStore:
    """The file of one vocabulary. Its methods do not raise OSError: an answer must not fail because of the cache.

    Attributes:
        failures: number of failed reads and writes; the first one is logged.
        damaged: number of unreadable lines, and of unreadable files, which are moved aside.
    """

    def __init__(self, directory: Path, vocabulary: str, max_bytes: int = MAX_FILE_BYTES) -> None:
        """
        Args:
            vocabulary: hash of the vocabulary.
            max_bytes: size of the file above which it is halved; the newest text is always kept.
        """
        self.path = directory / f"{Path(vocabulary).name}{STORE_SUFFIX}"
        self.failures = self.damaged = 0
        self._vocabulary = vocabulary
        self._max_bytes = max_bytes
        self._born = ""

    def read(self) -> list[NgramRecord]:
        """Return all texts, the latest last."""
        records: list[NgramRecord] = []
        with self._counting_failures(), lock_directory(self.path.parent):
            self._born = self._read_born()
            lines = self.path.read_bytes().split(b"\n")[1:-1] if self._born else []
            for line in filter(None, lines):
                try:
                    records.append(msgspec.json.decode(line, type=NgramRecord))
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    self.damaged += 1
        return records

    def append(self, record: NgramRecord) -> bool:
        """Append a text. Returns whether another process has erased the file since the last access."""
        previous = self._born
        with self._counting_failures(), lock_directory(self.path.parent):
            self._born = self._read_born()
            if not self._born:
                self._born = secrets.token_hex(8)
                header = StoreHeader(flexspec_memory=1, vocabulary=self._vocabulary, born=self._born)
                write_atomically(self.path, msgspec.json.encode(header) + b"\n")
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                ends_in_newline = os.pread(file, 1, size - 1) == b"\n"
                line = (b"" if ends_in_newline else b"\n") + msgspec.json.encode(record) + b"\n"
                try:
                    if os.write(file, line) < len(line):
                        raise OSError("the disk is full")
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
            if size + len(line) > self._max_bytes:
                self._drop_older_half()
        return bool(previous) and previous != self._born

    def _read_born(self) -> str:
        """The `born` of the file; empty if there is no file. A file that is not a store is moved aside."""
        try:
            with self.path.open("rb") as file:
                line = file.readline(1000)
                if os.fstat(file.fileno()).st_size > 4 * self._max_bytes:
                    raise msgspec.ValidationError("the file is too large")
            header = msgspec.json.decode(line, type=StoreHeader)
            if header.vocabulary != self._vocabulary:
                raise msgspec.ValidationError("it belongs to another vocabulary")
        except FileNotFoundError:
            return ""
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            aside = self.path.with_suffix(DAMAGED_SUFFIX)
            logger.warning("%s is not an n-gram cache of this draft (%s): moved to %s", self.path, error, aside.name)
            self.path.replace(aside)
            self.damaged += 1
            return ""
        return header.born

    def _drop_older_half(self) -> None:
        header, *lines = self.path.read_bytes().split(b"\n")
        kept: list[bytes] = []
        size = 0
        for line in reversed(lines):
            size += len(line) + 1
            if kept and size > self._max_bytes // 2:
                break
            kept += [line] if line else []
        write_atomically(self.path, b"\n".join([header, *reversed(kept)]) + b"\n")

    @contextlib.contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                logger.warning("cannot keep the n-gram cache in %s: %s", self.path.parent, error.strerror or error)


def erase_stores(directory: Path) -> int:
    """Delete all stores in `directory`, damaged ones included. Returns the number of files. Raises OSError."""
    with lock_directory(directory):
        suffixes = (STORE_SUFFIX, DAMAGED_SUFFIX, SCRATCH_SUFFIX)
        files = [path for path in directory.iterdir() if path.suffix in suffixes]
        for path in files:
            path.unlink()
        fsync_path(directory)
    return len(files)
