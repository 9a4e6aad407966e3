"""Block maps (.bmap, version 2.0 of bmap-tools): which blocks of an image hold something, and their checksums.

Blocks outside of the map are free space of the file systems, so whatever a card has there may stay. Blocks of zeros
that belong to a file system are in the map: a card need not have zeros there.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.etree import ElementTree

from edge_runtime.protocol.errors import InputError

BLOCK_BYTES = 4096
READ_BYTES = 1 << 20
NO_CHECKSUM = "0" * 64
HEADER = """<?xml version="1.0" ?>
<!-- Block map of a disk image. `device-profile flash` and `bmaptool copy` write the blocks below, and only those. -->
<bmap version="2.0">
    <ImageSize> {size} </ImageSize>
    <BlockSize> {block} </BlockSize>
    <BlocksCount> {blocks} </BlocksCount>
    <MappedBlocksCount> {mapped} </MappedBlocksCount>
    <ChecksumType> sha256 </ChecksumType>
    <BmapFileChecksum> {checksum} </BmapFileChecksum>
    <BlockMap>
"""
FOOTER = "    </BlockMap>\n</bmap>\n"


class BlockRange(NamedTuple):
    """Consecutive blocks.

    Attributes:
        first, last: block numbers, both included.
        checksum: SHA-256 of the content, in hexadecimal; empty if unknown.
    """

    first: int
    last: int
    checksum: str = ""


class BlockMap(NamedTuple):
    """The map of one image.

    Attributes:
        block_bytes: size of a block; the last one may be shorter.
        ranges: what to write, in ascending order.
    """

    image_bytes: int
    block_bytes: int
    ranges: list[BlockRange]

    @property
    def mapped_bytes(self) -> int:
        """How much is to be written."""
        return sum(size for _, size, _ in self.spans())

    def spans(self) -> Iterator[tuple[int, int, str]]:
        """Yield offset, size in bytes and checksum of every range."""
        for first, last, checksum in self.ranges:
            start = first * self.block_bytes
            yield start, min((last + 1) * self.block_bytes, self.image_bytes) - start, checksum


def whole_image(image_bytes: int) -> BlockMap:
    """Return the map of an image of which nothing is known: all of it."""
    return BlockMap(image_bytes, BLOCK_BYTES, [BlockRange(0, (image_bytes - 1) // BLOCK_BYTES)])


def map_image(image: Path, spans: Iterable[tuple[int, int]]) -> BlockMap:
    """Return the map of an image, given offset and size in bytes of everything that it uses; with checksums."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(
        (start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES) for start, size in spans if size
    ):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    size = image.stat().st_size
    unchecked = BlockMap(size, BLOCK_BYTES, [BlockRange(first, last) for first, last in merged])
    with image.open("rb") as file:
        sums = [_checksum(file, offset, length) for offset, length, _ in unchecked.spans()]
    ranges = [BlockRange(first, last, checksum) for (first, last), checksum in zip(merged, sums, strict=True)]
    return BlockMap(size, BLOCK_BYTES, ranges)


def write_block_map(block_map: BlockMap) -> str:
    """Return the text of a .bmap file."""
    mapped = sum(last - first + 1 for first, last, _ in block_map.ranges)
    blocks = -(-block_map.image_bytes // block_map.block_bytes)
    sizes = {"size": block_map.image_bytes, "block": block_map.block_bytes, "blocks": blocks, "mapped": mapped}
    lines = [
        f'        <Range chksum="{checksum}"> {first if first == last else f"{first}-{last}"} </Range>\n'
        for first, last, checksum in block_map.ranges
    ]
    text = HEADER.format(checksum=NO_CHECKSUM, **sizes) + "".join(lines) + FOOTER
    return text.replace(NO_CHECKSUM, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_block_map(path: Path) -> BlockMap:
    """Read a .bmap file. Raises InputError: it cannot be read, is damaged, or has checksums other than SHA-256."""
    try:
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        size, block = (int(root.findtext(name, "")) for name in ("ImageSize", "BlockSize"))
        ranges = [_parse_range(item) for item in root.iter("Range")]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, ElementTree.ParseError) as error:
        raise InputError(f"{path} is not a block map ({error}); get it again, or flash with --no-bmap") from None
    checksum = root.findtext("BmapFileChecksum", "").strip()
    if checksum and hashlib.sha256(text.replace(checksum, NO_CHECKSUM, 1).encode()).hexdigest() != checksum:
        raise InputError(f"{path} is damaged: its checksum is wrong; get it again, or flash with --no-bmap")
    ends = [last for _, last, _ in ranges]
    if block <= 0 or ends != sorted(ends) or any(last * block >= size for last in ends):
        raise InputError(f"{path} has blocks outside of its image; get it again, or flash with --no-bmap")
    return BlockMap(size, block, ranges)


def fat_spans(file: BinaryIO, offset: int) -> list[tuple[int, int]]:
    """Return offset and size of what a FAT32 file system that starts at `offset` uses: its tables and its clusters.

    Raises InputError: there is no FAT32 file system.
    """
    file.seek(offset)
    boot = file.read(512)
    sector, per_cluster, reserved, tables = struct.unpack_from("<HBHB", boot, 11)
    total, table_sectors = struct.unpack_from("<II", boot, 32)
    if boot[510:512] != b"\x55\xaa" or boot[82:87] != b"FAT32" or not sector or not per_cluster:
        raise InputError("the first partition of the image is not a FAT32 file system")
    data, cluster = (reserved + tables * table_sectors) * sector, per_cluster * sector
    file.seek(offset + reserved * sector)
    count = (total * sector - data) // cluster
    entries = struct.unpack(f"<{count + 2}I", file.read(4 * (count + 2)))
    used = [number for number, entry in enumerate(entries) if number >= 2 and entry & 0x0FFFFFFF]
    return [(offset, data), *((offset + data + (number - 2) * cluster, cluster) for number in used)]


def _parse_range(item: ElementTree.Element) -> BlockRange:
    first, _, last = (item.text or "").strip().partition("-")
    checksum = item.get("chksum", "")
    if checksum and not re.fullmatch(r"[0-9a-f]{64}", checksum):
        raise ValueError("checksums are not SHA-256")
    return BlockRange(int(first), int(last or first), checksum)


def _checksum(file: BinaryIO, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while size > 0:
        chunk = file.read(min(size, READ_BYTES))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()
