"""The memory on disk: a file for each vocabulary, which several processes may add to.

A line says which format and vocabulary; then a line for each text, the latest last. So what a killed process or a full
disk left half-written is one line that does not parse, and the next begins anew. Where the file has grown too long its
newer half replaces it at once. A digit that the disk has changed makes a wrong guess, and no wrong text.

It holds what people wrote: only its user may read it.
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

from edge_runtime.common.files import SCRATCH, locked, sync, write_whole

logger = logging.getLogger(__name__)

SUFFIX, ASIDE = ".jsonl", ".damaged"
# Some 90,000 tokens, of which a memory takes the last.
MOST_BYTES = 1 << 19


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line. `born` is another after every erasing."""

    flexspec_memory: Literal[1]
    vocabulary: str
    born: str


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text: the exact target version that verified it, its ids, and what its hints were worth (`recall.PRIOR`)."""

    version: str
    ids: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]
    weights: list[float]


class Store:
    """The file of one vocabulary. Never raises: a memory that cannot be kept is not worth an answer.

    Attributes:
        path: of the file.
        failures: how often reading or writing failed; the first one is logged.
        damaged: lines that made no sense, and files, which were set aside.
    """

    def __init__(self, directory: Path, vocabulary: str, most_bytes: int = MOST_BYTES) -> None:
        """
        Args:
            vocabulary: its hash.
            most_bytes: of the file, but for one text.
        """
        self.path = directory / f"{Path(vocabulary).name}{SUFFIX}"
        self.failures = self.damaged = 0
        self._vocabulary = vocabulary
        self._most_bytes = most_bytes
        self._born = ""

    def read(self) -> list[Record]:
        """All texts, the latest last."""
        records: list[Record] = []
        with self._trying(), locked(self.path.parent):
            self._born = self._header()
            lines = self.path.read_bytes().split(b"\n")[1:-1] if self._born else []
            for line in filter(None, lines):
                try:
                    records.append(msgspec.json.decode(line, type=Record))
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    self.damaged += 1
        return records

    def append(self, record: Record) -> bool:
        """Adds a text. Returns whether somebody has erased the others meanwhile."""
        before = self._born
        with self._trying(), locked(self.path.parent):
            self._born = self._header()
            if not self._born:
                self._born = secrets.token_hex(8)
                write_whole(self.path, msgspec.json.encode(Header(1, self._vocabulary, self._born)) + b"\n")
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                whole = os.pread(file, 1, size - 1) == b"\n"
                line = (b"" if whole else b"\n") + msgspec.json.encode(record) + b"\n"
                try:
                    if os.write(file, line) < len(line):
                        raise OSError("the disk is full")
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
            if size + len(line) > self._most_bytes:
                self._halve()
        return bool(before) and before != self._born

    def _header(self) -> str:
        """The `born` of the file; empty where there is none. One that is no such file is set aside."""
        try:
            with self.path.open("rb") as file:
                line = file.readline(1000)
                if os.fstat(file.fileno()).st_size > 4 * self._most_bytes:
                    raise msgspec.ValidationError("too long")
            header = msgspec.json.decode(line, type=Header)
            if header.vocabulary != self._vocabulary:
                raise msgspec.ValidationError("another vocabulary's")
        except FileNotFoundError:
            return ""
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            aside = self.path.with_suffix(ASIDE)
            logger.warning("%s is no memory of this draft's (%s): moved to %s", self.path, error, aside.name)
            self.path.replace(aside)
            self.damaged += 1
            return ""
        return header.born

    def _halve(self) -> None:
        """Forgets the older half."""
        header, *lines = self.path.read_bytes().split(b"\n")
        kept: list[bytes] = []
        size = 0
        for line in reversed(lines):
            size += len(line) + 1
            if kept and size > self._most_bytes // 2:
                break
            kept += [line] if line else []
        write_whole(self.path, b"\n".join([header, *reversed(kept)]) + b"\n")

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                logger.warning("the memory in %s is not kept: %s", self.path.parent, error.strerror or error)


def erase(directory: Path) -> int:
    """Removes all memories in `directory`, and what was set aside. Returns how many files. Raises OSError."""
    with locked(directory):
        files = [path for path in directory.iterdir() if path.suffix in (SUFFIX, ASIDE, SCRATCH)]
        for path in files:
            path.unlink()
        sync(directory)
    return len(files)
