"""Writes an image to a card so that a card that boots is a card that was written completely.

The partition table comes last: first the old one is erased, then everything else is written and read back, and only
then the first blocks of the image are written. Whenever this is interrupted before, the card does not boot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import lzma
import os
import stat
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from device_profiles.image.block_map import BlockMap
from edge_runtime.protocol.errors import FlexSpecError, InputError

CHUNK_BYTES = 1 << 20
# What is written last: the partition table, and whatever a boot loader has before the first partition.
HEAD_BYTES = CHUNK_BYTES
# Flushing this often keeps the shown rate that of the card, not that of memory. Chosen.
FLUSH_BYTES = 16 << 20
# From linux/fs.h: read the partition table again; discard cached blocks.
BLKRRPART, BLKFLSBUF = 0x125F, 0x1261
UNBOOTABLE = "the card does not boot until it is written completely: run the same command again"

# Called with the stage, `write` or `verify`, and the bytes that are done of it.
Progress = Callable[[str, int], None]


class FlashError(FlexSpecError):
    """A card was not written, or not as it should have been. The message says that it does not boot."""


class Written(NamedTuple):
    """A chunk of a card, and the SHA-256 of what was written there."""

    offset: int
    size: int
    digest: bytes


class CardDevice:
    """A block device, or a file that stands for one, opened exclusively."""

    def __init__(self, path: Path, *, exclusive: bool = True) -> None:
        """
        Args:
            exclusive: fail if the device, or a part of it, is mounted.

        Raises:
            InputError: it cannot be opened.
        """
        self.path = path
        # Without O_CREAT, O_EXCL makes the kernel refuse a block device that is in use.
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0)
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            advice = {errno.EACCES: "run this with sudo", errno.EBUSY: "unmount it first"}.get(error.errno or 0, "")
            raise InputError(f"cannot open {path}: {error.strerror}" + (f"; {advice}" if advice else "")) from None
        self.bytes = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._is_block_device = stat.S_ISBLK(os.fstat(self._descriptor).st_mode)

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write at `offset`. Returns how many bytes were taken. Raises OSError."""
        return os.pwrite(self._descriptor, data, offset)

    def read(self, size: int, offset: int) -> bytes:
        """Read from the medium, not from memory, after `flush`. Raises OSError."""
        return os.pread(self._descriptor, size, offset)

    def flush(self) -> None:
        """Wait until everything is on the medium. Raises OSError."""
        os.fsync(self._descriptor)

    def forget(self) -> None:
        """Make `read` read from the medium what is in memory now."""
        self.flush()
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._is_block_device:
            fcntl.ioctl(self._descriptor, BLKFLSBUF)

    def read_partition_table(self) -> None:
        """Make the kernel read the new partition table; if it cannot, the card has to be reinserted."""
        if self._is_block_device:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._descriptor, BLKRRPART)

    def close(self) -> None:
        """Close the device."""
        os.close(self._descriptor)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[BinaryIO]:
    """Open an image, compressed with xz, gzip or zstd or not. Raises InputError: it cannot be read."""
    try:
        match path.suffix:
            case ".xz":
                with lzma.open(path) as xz:
                    yield cast(BinaryIO, xz)
            case ".gz":
                with gzip.open(path) as gz:
                    yield cast(BinaryIO, gz)
            case ".zst":
                with _open_zstd(path) as zst:
                    yield zst
            case _:
                with path.open("rb") as raw:
                    yield raw
    except FileNotFoundError as error:
        raise InputError(f"there is no {error.filename or path}") from None


def write_image(image: BinaryIO, block_map: BlockMap, device: CardDevice, progress: Progress) -> None:
    """Write an image to a device, and compare all of it with what was written.

    Raises:
        InputError: the device is too small; nothing was written.
        FlashError: writing failed, or something else is on the card than was written.
    """
    if device.bytes < block_map.image_bytes:
        raise InputError(
            f"{device.path} has {device.bytes / 1e9:.2f} GB, and the image has {block_map.image_bytes / 1e9:.2f} GB; "
            "use a larger card; nothing was written"
        )
    try:
        _erase(device)
        head, written = _write_ranges(image, block_map, device, progress)
        verify(device, written, lambda count: progress("verify", count))
        _write_all(device, head, 0)
        device.flush()
        verify(device, [Written(0, len(head), _digest(head))], lambda count: None)
        # The head has gaps, so its size is no measure of what was left to do.
        progress("verify", block_map.mapped_bytes)
        device.read_partition_table()
    except OSError as error:
        raise FlashError(f"{device.path}: {_explain(error)}; {UNBOOTABLE}") from None
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise FlashError(f"the image is damaged ({error or 'it ends too early'}); get it again; {UNBOOTABLE}") from None


def verify(device: CardDevice, written: list[Written], progress: Callable[[int], None]) -> None:
    """Compare a device with what was written to it. Raises OSError, FlashError."""
    device.forget()
    done = 0
    for offset, size, digest in written:
        content = device.read(size, offset)
        if len(content) != size or _digest(content) != digest:
            raise FlashError(
                f"{device.path} does not hold what was written at byte {offset}: the card is worn out or fake, or its "
                f"reader is faulty; use another one; {UNBOOTABLE}"
            )
        done += size
        progress(done)


def _erase(device: CardDevice) -> None:
    """Erase the partition table at the start, and the copy of a GPT at the end."""
    zeros = bytes(HEAD_BYTES)
    for offset in (0, max(0, device.bytes - HEAD_BYTES)):
        _write_all(device, memoryview(zeros)[: device.bytes - offset], offset)
    device.flush()


def _write_ranges(
    image: BinaryIO, block_map: BlockMap, device: CardDevice, progress: Progress
) -> tuple[bytes, list[Written]]:
    """Write everything but the first HEAD_BYTES. Returns those, and what was written."""
    head, written, done, unflushed = bytearray(), [], 0, 0
    for start, size, checksum in block_map.spans():
        digest = hashlib.sha256()
        image.seek(start)
        offset, end = start, start + size
        while offset < end:
            chunk = _read_exactly(image, min(CHUNK_BYTES, end - offset))
            digest.update(chunk)
            kept = max(0, min(len(chunk), HEAD_BYTES - offset))
            if kept:
                head += bytes(offset - len(head)) + chunk[:kept]
            if kept < len(chunk):
                _write_all(device, memoryview(chunk)[kept:], offset + kept)
                written.append(Written(offset + kept, len(chunk) - kept, _digest(chunk[kept:])))
            offset, done, unflushed = offset + len(chunk), done + len(chunk), unflushed + len(chunk)
            if unflushed >= FLUSH_BYTES:
                device.flush()
                unflushed = 0
            progress("write", done)
        if checksum and digest.hexdigest() != checksum:
            raise FlashError(f"the image is damaged between bytes {start} and {end}; get it again; {UNBOOTABLE}")
    device.flush()
    return bytes(head), written


def _write_all(device: CardDevice, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`, in as many writes as it takes. Raises OSError."""
    view = memoryview(data)
    while view:
        count = device.write(view, offset)
        if count <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[count:], offset + count


def _read_exactly(image: BinaryIO, size: int) -> bytes:
    """Read `size` bytes. Raises EOFError: the image is shorter."""
    parts = []
    while size > 0:
        part = image.read(size)
        if not part:
            raise EOFError("it ends too early")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def _open_zstd(path: Path) -> Iterator[BinaryIO]:
    command = ["zstd", "--decompress", "--stdout", "--quiet", str(path)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise InputError("zstd not found; install it with `sudo apt install zstd`") from None
    try:
        yield cast(BinaryIO, _ForwardOnly(cast(BinaryIO, process.stdout)))
    finally:
        process.kill()
        process.communicate()


class _ForwardOnly:
    """A pipe of which parts can be skipped."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._position = 0

    def read(self, size: int) -> bytes:
        data = self._pipe.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int) -> int:
        while self._position < offset:
            if not self.read(min(CHUNK_BYTES, offset - self._position)):
                raise EOFError("it ends too early")
        return self._position


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENODEV, errno.ENXIO, errno.EIO, errno.ENOMEDIUM):
        return f"the card was removed, or failed ({error.strerror})"
    return f"writing failed ({error.strerror})"
