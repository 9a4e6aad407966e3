"""The reader of archives compared with the standard library's `tarfile`, which makes them; and what only it refuses."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.common.tar_stream import ArchiveError, TarStream, decompress, open_tar

KINDS = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
Found = list[tuple[str, str, bytes, str]]

# Names that fit into a plain header, except in the newest format if they are not ASCII.
names = st.text("abc/.é ", min_size=1, max_size=40).filter(lambda name: not name.endswith("/"))
members = st.lists(st.tuples(names, st.sampled_from(sorted(KINDS)), st.binary(max_size=1200)), min_size=1, max_size=6)


def make(described: list[tuple[str, str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for name, kind, data in described:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = KINDS[kind], 1.5 if form == tarfile.PAX_FORMAT else 1
            if kind == "file":
                info.size = len(data)
            elif kind == "link":
                info.linkname = "target"
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def read(content: bytes, *, max_bytes: int = 1 << 20, max_members: int = 10, links: bool = True) -> Found:
    tar = TarStream(io.BytesIO(content), max_bytes=max_bytes, max_members=max_members, links=links)
    return [(member.name.rstrip("/"), member.kind, tar.read(1 << 20), member.target) for member in tar]


def read_with_tarfile(content: bytes) -> Found:
    kinds = {kind: name for name, kind in KINDS.items()}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [
            (
                info.name,
                kinds[info.type],
                file.read() if (file := info.isreg() and tar.extractfile(info)) else b"",
                info.linkname,
            )
            for info in tar
        ]


@given(members, st.sampled_from(FORMATS))
@example([("a/" * 60 + "b", "file", b"in the prefix")], tarfile.USTAR_FORMAT)
def test_what_it_reads_is_what_tarfile_reads(described: list[tuple[str, str, bytes]], form: int) -> None:
    try:
        content = make(described, form)
        found = read(content)
    except (ValueError, ArchiveError) as error:
        # A name beyond ASCII gets a header of its own in the newest format.
        assert form == tarfile.PAX_FORMAT and "'path'" in str(error)
    else:
        assert found == read_with_tarfile(content)


@given(members, st.data())
def test_a_damaged_archive_is_read_or_refused(described: list[tuple[str, str, bytes]], data: st.DataObject) -> None:
    content = bytearray(make(described))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        damage = data.draw(st.binary(min_size=1, max_size=12))
        content[position : position + len(damage)] = damage
    with contextlib.suppress(ArchiveError):
        assert sum(len(text) for _, _, text, _ in read(bytes(content))) <= len(content)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_are_read_and_cut_ones_refused(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    packed = compress(make([("a", "file", b"text" * 300)]))
    (tmp_path / "whole").write_bytes(packed)
    with open_tar(tmp_path / "whole", max_bytes=1 << 20, max_members=1) as tar:
        assert [(member.name, tar.read(4)) for member in tar] == [("a", b"text")]
    (tmp_path / "cut").write_bytes(packed[: len(packed) // 12])
    with open_tar(tmp_path / "cut", max_bytes=1 << 20, max_members=1) as tar, pytest.raises(ArchiveError):
        list(tar)


def test_xz_may_not_ask_for_more_memory_than_its_bound() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    packed = lzma.compress(b"x", filters=filters)
    with pytest.raises(ArchiveError, match="Memory usage limit"):
        list(TarStream(decompress(io.BytesIO(packed)), max_bytes=1 << 20, max_members=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (bytes(1024), "it is empty"),
        (b"text", "ends early"),
        (b"text" * 200, "not of a tar archive"),
        (make([("a", "file", b"x" * 600)])[:700], "ends early"),
        (make([("a", "link", b"")]), "'a' is a symbolic link"),
        (make([("a", "file", b"")] * 11), "more than 10 members"),
        (make([("a", "file", bytes(2 << 20))]), "unpacks to more than 1048576 bytes"),
    ],
    ids=["empty", "zeros", "short", "text", "cut", "link", "many", "large"],
)
def test_what_is_no_archive_of_ours_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        read(content, links=False)
