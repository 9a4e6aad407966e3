"""Bundles on their way into a store, from a directory or an archive: what the manifest names, and nothing else."""

from __future__ import annotations

import contextlib
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from edge_runtime.bundles.signatures import SIGNATURE
from edge_runtime.protocol.bundle import MANIFEST, READ_SIZE, read_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing

# A bundle has four files; an archive of very many is none.
MOST_MEMBERS = 1000
# What tarfile and the decompressors raise on bytes that nobody packed. MemoryError is that of a length that is absurd.
DAMAGE = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


class StoreError(BundleError):
    """A bundle store that cannot be written or read: no room, no permission."""


def fetch(source: Path, scratch: Path) -> tuple[Path, list[str]]:
    """Copies the bundle at `source` into a new directory inside `scratch`; hashes are still to be checked.

    Args:
        source: a bundle's directory, or a tar archive of one, compressed or not.
        scratch: an empty directory.

    Returns:
        The new directory, and names of files that were left out because the manifest does not name them.

    Raises:
        BundleMissing: there is nothing at `source`, or no bundle, or not all of it.
        BundleCorrupt: the archive is damaged or hostile, or the manifest is.
        StoreError: there is not enough room.
        OSError: writing failed.
    """
    with _reading(source):
        if not source.exists():
            raise BundleMissing(f"there is nothing at {source}; give a bundle's directory, or a tar archive of one")
        is_directory = source.is_dir()
    root = source if is_directory else _unpack(source, scratch / "unpacked")
    manifest = read_bundle(root, verify=False).manifest
    with _reading(source):
        there = {path.name for path in root.iterdir()}
    names = {MANIFEST, *manifest.files} | ({SIGNATURE} & there)
    work = scratch / "bundle"
    work.mkdir()
    for name in sorted(names):
        if is_directory:
            _copy(root / name, work / name)
        else:
            (root / name).rename(work / name)
    return work, sorted(there - names)


def _copy(source: Path, target: Path) -> None:
    with _reading(source):
        file = source.open("rb")
    with file:
        _pour(file, source.stat().st_size, target, source)


def _unpack(archive: Path, target: Path) -> Path:
    """Writes the plain files of `archive`, which may be in one folder but not in several, into a new directory."""
    target.mkdir()
    with contextlib.ExitStack() as stack:
        with _reading(archive):
            try:
                tar = stack.enter_context(tarfile.open(archive))
            except tarfile.ReadError:
                raise BundleCorrupt(
                    f"{archive} is neither a bundle's directory nor a .tar, .tar.gz, .tar.bz2 or .tar.xz of one"
                ) from None
        folders: set[PurePosixPath] = set()
        for _ in range(MOST_MEMBERS):
            with _reading(archive):
                member = tar.next()
                if member is None:
                    return target
                # Refuses what would end up outside; the checks behind it are narrower still.
                member = tarfile.data_filter(member, str(target))
                if member.isdir():
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                name = PurePosixPath(member.name)
                folders.add(name.parent)
                is_there = (target / name.name).exists()
            if content is None or is_there or len(folders) > 1 or len(name.parts) > 2:
                raise BundleCorrupt(
                    f"{archive} holds {member.name!r}: a bundle is plain files in one folder, each there once; "
                    "do not install what you do not know"
                )
            _pour(content, member.size, target / name.name, archive)
    raise BundleCorrupt(f"{archive} holds more than {MOST_MEMBERS} files: this is no bundle")


def _pour(content: IO[bytes], size: int, target: Path, source: Path) -> None:
    """Writes the `size` bytes of `content`, which is or is part of `source`, to `target`."""
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise StoreError(
            f"there is no room for {target.name}: it has {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free; "
            "remove old bundles with `edge-runtime bundle remove`, or something else"
        )
    with target.open("xb") as written:
        while True:
            with _reading(source):
                piece = content.read(READ_SIZE)
            if not piece:
                return
            written.write(piece)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Makes what reading `source` raises a BundleError; tarfile and what it stands on raise many kinds."""
    try:
        yield
    except OSError as error:
        # Decompressors raise it too, but what the system says has a number.
        if error.errno is not None:
            raise BundleMissing(f"cannot read {source}: {error.strerror}") from None
        raise _damaged(source, error) from None
    except DAMAGE as error:
        raise _damaged(source, error) from None


def _damaged(source: Path, error: BaseException) -> BundleCorrupt:
    what = str(error) or type(error).__name__
    return BundleCorrupt(f"{source} is damaged or hostile ({what}): get it again from who made it")
