"""Copies a bundle from a directory or an archive into a store: the files that its manifest names, and nothing else."""

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
from edge_runtime.protocol.bundle import MANIFEST_NAME, READ_CHUNK_BYTES, read_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing

# Chosen: a bundle has four files, so an archive of this many entries is not a bundle.
MAX_ARCHIVE_MEMBERS = 1000
# Exceptions of tarfile and the decompressors for malformed input. MemoryError results from an absurd length field.
MALFORMED_ARCHIVE_ERRORS = (
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
    """The bundle store cannot be read or written: no space, no permission."""


def fetch(source: Path, scratch: Path) -> tuple[Path, list[str]]:
    """Copy the bundle at `source` into a new directory inside `scratch`. Hashes are not checked yet.

    Args:
        source: a bundle's directory, or a tar archive of one, compressed or not.
        scratch: an empty directory.

    Returns:
        The new directory, and the names of files that were skipped because the manifest does not name them.

    Raises:
        BundleMissing: `source` does not exist, is not a bundle, or is incomplete.
        BundleCorrupt: the archive or the manifest is damaged or hostile.
        StoreError: there is not enough space.
        OSError: writing failed.
    """
    with _reading(source):
        if not source.exists():
            raise BundleMissing(f"there is nothing at {source}; give a bundle's directory, or a tar archive of one")
        is_directory = source.is_dir()
    root = source if is_directory else _unpack(source, scratch / "unpacked")
    manifest = read_bundle(root, verify=False).manifest
    with _reading(source):
        present = {path.name for path in root.iterdir()}
    names = {MANIFEST_NAME, *manifest.files} | ({SIGNATURE} & present)
    work = scratch / "bundle"
    work.mkdir()
    for name in sorted(names):
        if is_directory:
            _copy(root / name, work / name)
        else:
            (root / name).rename(work / name)
    return work, sorted(present - names)


def _copy(source: Path, target: Path) -> None:
    with _reading(source):
        file = source.open("rb")
    with file:
        _write(file, source.stat().st_size, target, source)


def _unpack(archive: Path, target: Path) -> Path:
    """Extract the regular files of `archive`, which must be in at most one folder, into a new directory."""
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
        for _ in range(MAX_ARCHIVE_MEMBERS):
            with _reading(archive):
                member = tar.next()
                if member is None:
                    return target
                # Rejects members outside the target; the checks below are stricter.
                member = tarfile.data_filter(member, str(target))
                if member.isdir():
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                name = PurePosixPath(member.name)
                folders.add(name.parent)
                already_extracted = (target / name.name).exists()
            if content is None or already_extracted or len(folders) > 1 or len(name.parts) > 2:
                raise BundleCorrupt(
                    f"{archive} contains {member.name!r}: a bundle has regular files in one folder, each once; "
                    "do not install archives from unknown sources"
                )
            _write(content, member.size, target / name.name, archive)
    raise BundleCorrupt(f"{archive} contains more than {MAX_ARCHIVE_MEMBERS} files, so it is not a bundle")


def _write(content: IO[bytes], size: int, target: Path, source: Path) -> None:
    """Write the `size` bytes of `content`, which comes from `source`, to `target`."""
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise StoreError(
            f"no space for {target.name}: it takes {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free; "
            "remove old bundles with `edge-runtime bundle remove`, or free space otherwise"
        )
    with target.open("xb") as written:
        while True:
            with _reading(source):
                chunk = content.read(READ_CHUNK_BYTES)
            if not chunk:
                return
            written.write(chunk)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Convert exceptions of reading `source` to BundleError; tarfile and the decompressors raise many kinds."""
    try:
        yield
    except OSError as error:
        # Decompressors raise OSError too, but only the operating system sets errno.
        if error.errno is not None:
            raise BundleMissing(f"cannot read {source}: {error.strerror}") from None
        raise _damaged(source, error) from None
    except MALFORMED_ARCHIVE_ERRORS as error:
        raise _damaged(source, error) from None


def _damaged(source: Path, error: BaseException) -> BundleCorrupt:
    cause = str(error) or type(error).__name__
    return BundleCorrupt(f"{source} is damaged or hostile ({cause}): get it again from its maker")
