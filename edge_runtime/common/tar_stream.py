"""Reads untrusted tar archives: member by member, in constant memory, with a bound on everything.

The standard library's `tarfile` joins headers of any length in memory, writes as much as a sparse member claims, and
follows what an archive says about links. This reader takes regular files and directories with plain headers (POSIX
ustar and GNU, as every tar program writes them for short names), symbolic links only on request, and refuses everything
else by name. pax headers may carry what is not used here anyway, such as times with fractions.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol

from edge_runtime.protocol.errors import FlexSpecError

# Size of a header; contents are padded to a multiple of it (POSIX, ustar interchange format).
BLOCK_BYTES = 512
CHUNK_BYTES = 1 << 20
# Chosen: times, owners and extended attributes of one member take a few hundred bytes.
MAX_PAX_BYTES = 1 << 13
# `xz -9` needs 65 MiB to decompress (xz(1)); a header may ask for 4 GiB.
XZ_MEMORY_BYTES = 1 << 27
# Keywords of pax headers that change neither name nor content of a member.
_IGNORED_PAX = re.compile(
    r"mtime|atime|ctime|uid|gid|uname|gname|comment|charset|hdrcharset"
    r"|LIBARCHIVE\.(creationtime|xattr\..+)|SCHILY\.(dev|ino|nlink|fflags|xattr\..+)|RHT\.security\.selinux"
)
_PAX_RECORD = re.compile(rb"(\d{1,5}) ([^=\n]{1,255})=")
_REFUSED_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file", b"K": "a long link", b"L": "a long name",
}  # fmt: skip
# Exceptions that the decompressors raise for malformed input.
_DAMAGE = (EOFError, ValueError, ArithmeticError, zlib.error, lzma.LZMAError, MemoryError)

MemberKind = Literal["file", "directory", "link"]


class ArchiveError(FlexSpecError):
    """An archive is damaged, or contains something that does not belong there. Callers name it and the remedy."""


class Readable(Protocol):
    """A source of bytes, which returns fewer than asked for only at its end."""

    def read(self, size: int, /) -> bytes: ...


class TarMember(NamedTuple):
    """One member of an archive.

    Attributes:
        name: as in the archive: it may be absolute or lead upwards. Quote it in messages.
        size: bytes of a file's content.
        target: of a symbolic link.
    """

    name: str
    kind: MemberKind
    size: int
    mode: int
    target: str


class TarStream:
    """A tar archive that is read once, from front to end.

    Iterate over the members; `read` returns the content of the latest one. Only one block and what `read` returns are
    in memory.
    """

    def __init__(self, file: Readable, *, max_bytes: int, max_members: int, links: bool = False) -> None:
        """
        Args:
            file: the archive, decompressed.
            max_bytes: bound on everything that is read, skipped contents included.
            max_members: bound on the number of members.
            links: allow symbolic links.
        """
        self._file = file
        self._max_bytes, self._max_members, self._links = max_bytes, max_members, links
        self._position = self._remaining = self._padding = 0

    def __iter__(self) -> Iterator[TarMember]:
        """The members. Raises ArchiveError, and OSError if the file cannot be read."""
        for _ in range(self._max_members):
            member = self._next()
            if member is None:
                return
            yield member
        if self._next() is not None:
            raise ArchiveError(f"it has more than {self._max_members} members")

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """The next bytes of the current member, `size` unless it ends before; none at its end.

        Raises:
            ArchiveError: the archive ends before the member.
            OSError: the file cannot be read.
        """
        data = self._read(min(size, self._remaining))
        self._remaining -= len(data)
        return data

    def _next(self) -> TarMember | None:
        """The next member, after the rest of the current one and headers without effect; None at the end."""
        while True:
            self._skip()
            header = self._read(BLOCK_BYTES, may_end=True)
            if not header.strip(b"\0"):
                if self._position <= BLOCK_BYTES:
                    raise ArchiveError("it is empty")
                return None
            kind = header[156:157]
            size, name = self._size_and_name(header)
            if kind in (b"x", b"g"):
                if size > MAX_PAX_BYTES:
                    raise ArchiveError(f"it has a long header of {size} bytes")
                self._begin(size)
                _check_pax(self.read(size))
                continue
            if kind == b"5":
                return TarMember(name, "directory", 0, _octal(header[100:108]), "")
            if kind == b"2" and self._links:
                return TarMember(name, "link", 0, 0o777, _text(header[157:257]))
            if kind not in (b"0", b"\0"):
                what = _REFUSED_KINDS.get(kind, f"a member of the kind {kind!r}")
                raise ArchiveError(f"{name[:100]!r} is {what}, and only regular files belong there")
            self._begin(size)
            return TarMember(name, "file", size, _octal(header[100:108]), "")

    def _size_and_name(self, header: bytes) -> tuple[int, str]:
        blank = header[:148] + b" " * 8 + header[156:]
        if header[257:262] != b"ustar" or _octal(header[148:156]) != sum(blank):
            raise ArchiveError("it has a header that is not of a tar archive")
        name = _text(header[:100])
        # GNU's format, whose magic ends with blanks, has something else in the place of the prefix.
        if not header[262] and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        return _octal(header[124:136]), name

    def _begin(self, size: int) -> None:
        """Begin with the content of a member."""
        self._remaining, self._padding = size, -size % BLOCK_BYTES

    def _skip(self) -> None:
        """Read the rest of the current member."""
        while self.read():
            pass
        self._read(self._padding)
        self._padding = 0

    def _read(self, size: int, *, may_end: bool = False) -> bytes:
        """Exactly `size` bytes, or none at the end of the file if it `may_end` here."""
        if self._position + size > self._max_bytes:
            raise ArchiveError(f"it unpacks to more than {self._max_bytes} bytes")
        data = b""
        try:
            while len(data) < size and (piece := self._file.read(size - len(data))):
                data += piece
        except OSError as error:
            # Decompressors raise OSError, too, but only the operating system sets errno.
            if error.errno is not None:
                raise
            raise ArchiveError(f"it does not decompress: {error}") from None
        except _DAMAGE as error:
            raise ArchiveError(f"it does not decompress: {error or type(error).__name__}") from None
        if len(data) < size and (data or not may_end):
            raise ArchiveError("it ends early")
        self._position += len(data)
        return data


@contextlib.contextmanager
def open_tar(path: Path, *, max_bytes: int, max_members: int) -> Iterator[TarStream]:
    """Open the tar archive at `path`, plain or compressed by gzip, bzip2 or xz.

    Args:
        max_bytes, max_members: see `TarStream`.

    Raises:
        OSError: it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        stream = stack.enter_context(decompress(file))
        yield TarStream(stream, max_bytes=max_bytes, max_members=max_members)


def decompress(file: IO[bytes]) -> IO[bytes]:
    """What `file` decompresses to, by its first bytes; the file itself if it is not compressed."""
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]  # an IO in all but name
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if magic == b"\xfd7zXZ\0":
        return io.BufferedReader(_XzReader(file), CHUNK_BYTES)
    return file


class _XzReader(io.RawIOBase):
    """Decompresses one xz stream within `XZ_MEMORY_BYTES`; `lzma.LZMAFile` has no bound."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = b""
        while not data and not self._decompressor.eof:
            packed = self._file.read(io.DEFAULT_BUFFER_SIZE) if self._decompressor.needs_input else b""
            if self._decompressor.needs_input and not packed:
                raise EOFError("it ends early")
            data = self._decompressor.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _check_pax(content: bytes) -> None:
    """Check that a pax header has only keywords that are ignored. Raises ArchiveError."""
    while content.strip(b"\0"):
        record = _PAX_RECORD.match(content)
        length = int(record[1]) if record else 0
        if record is None or not record.end() < length <= len(content) or content[length - 1 : length] != b"\n":
            raise ArchiveError("it has a pax header that cannot be read")
        keyword = record[2].decode("utf-8", "replace")
        if not _IGNORED_PAX.fullmatch(keyword):
            raise ArchiveError(
                f"it sets {keyword[:80]!r} in a long header; make it with `tar --format=ustar`, and short names"
            )
        content = content[length:]


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ArchiveError("it has a header with a number that is not octal")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    try:
        return field.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        raise ArchiveError(f"it has the name {field[:100]!r}, which is not UTF-8") from None
