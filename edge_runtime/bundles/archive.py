"""Copies a bundle from a directory or an archive into a store: the files that its manifest names, and nothing else.

Manifest and signature are read first, wherever they are in an archive. Nothing is written before the signature is
verified, where signatures are demanded, and then each file is cut at the size that the manifest records for it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edge_runtime.bundles.signatures import SIGNATURE, SIGNATURE_BYTES, verify_signature
from edge_runtime.common.tar_stream import ArchiveError, TarMember, TarStream, open_tar
from edge_runtime.protocol.bundle import (
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    READ_CHUNK_BYTES,
    Manifest,
    parse_manifest,
    read_manifest_text,
)
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing

# Imported lazily: boards without a key do not need the library.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

# Chosen: a bundle has four files, so an archive of this many entries is not a bundle.
MAX_ARCHIVE_MEMBERS = 1000
# Bytes that are decompressed from an archive at most, including files that are not installed.
MAX_ARCHIVE_BYTES = MAX_FILE_BYTES
# Bounds of the files that are read before the manifest states their sizes, by name.
HEAD_BYTES = {MANIFEST_NAME: MAX_MANIFEST_BYTES, SIGNATURE: SIGNATURE_BYTES}


class StoreError(BundleError):
    """The bundle store cannot be read or written: no space, no permission."""


def fetch(source: Path, scratch: Path, keys: list[Ed25519PublicKey] | None = None) -> tuple[Path, list[str]]:
    """Copy the bundle at `source` into a new directory inside `scratch`. Hashes are not checked yet.

    Args:
        source: a bundle's directory, or a tar archive of one, compressed or not.
        scratch: an empty directory.
        keys: public keys, one of which must have signed the manifest; if there are none, no signature is required.

    Returns:
        The new directory, and the names of files that were skipped because the manifest does not name them.

    Raises:
        BundleMissing: `source` does not exist, is not a bundle, or is incomplete.
        BundleCorrupt: the archive or the manifest is damaged or hostile.
        BundleUntrusted: none of the keys signed it.
        StoreError: there is not enough space.
        OSError: writing failed.
    """
    with _reading(source):
        is_directory = source.is_dir()
        if not is_directory and not source.is_file():
            raise BundleMissing(f"there is nothing at {source}; give a bundle's directory, or a tar archive of one")
    head = _read_directory_head(source) if is_directory else _read_archive_head(source)
    if keys:
        verify_signature(head.get(MANIFEST_NAME), head.get(SIGNATURE), keys, source)
    if MANIFEST_NAME not in head:
        raise BundleMissing(f"{source} is not an archive of a bundle: it has no {MANIFEST_NAME}")
    manifest = parse_manifest(head[MANIFEST_NAME], source)
    size, free = sum(record.bytes for record in manifest.files.values()), shutil.disk_usage(scratch).free
    if size > free:
        raise StoreError(
            f"no space for {source}: it takes {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free; "
            "remove old bundles with `edge-runtime bundle remove`, or free space otherwise"
        )
    work = scratch / "bundle"
    work.mkdir()
    for name, content in head.items():
        (work / name).write_bytes(content)
    copy = _copy_directory if is_directory else _unpack
    return work, sorted(copy(source, manifest, work) - head.keys())


def _read_directory_head(source: Path) -> dict[str, bytes]:
    head = {MANIFEST_NAME: read_manifest_text(source)}
    with _reading(source):
        if (source / SIGNATURE).is_file():
            with (source / SIGNATURE).open("rb") as file:
                # A longer file is not a signature, and its beginning does not pass for one.
                head[SIGNATURE] = file.read(SIGNATURE_BYTES + 1)
    return head


def _copy_directory(source: Path, manifest: Manifest, work: Path) -> set[str]:
    """Copy the files that the manifest names. Returns the names of the others."""
    for name, record in manifest.files.items():
        path = source / name
        with _reading(path):
            if not path.is_file():
                raise BundleMissing(f"the bundle lacks {name} ({path}): copy the bundle again")
            _check_size(path, path.stat().st_size, record.bytes)
            file = path.open("rb")
        with file:
            _write(file.read, record.bytes, work / name, path)
    with _reading(source):
        return {path.name for path in source.iterdir()} - manifest.files.keys()


def _read_archive_head(archive: Path) -> dict[str, bytes]:
    head = {}
    for name, member, tar in _archive_files(archive):
        if name in HEAD_BYTES:
            if member.size > HEAD_BYTES[name]:
                raise BundleCorrupt(f"{archive} has a {name} of {member.size} bytes, so it is not a bundle")
            with _reading(archive):
                head[name] = tar.read(member.size)
    return head


def _unpack(archive: Path, manifest: Manifest, work: Path) -> set[str]:
    """Unpack the files that the manifest names. Returns the names of the others."""
    others, missing = set(), set(manifest.files)
    for name, member, tar in _archive_files(archive):
        if name not in manifest.files:
            others.add(name)
            continue
        record = manifest.files[name]
        _check_size(archive / name, member.size, record.bytes)
        _write(tar.read, record.bytes, work / name, archive)
        missing.discard(name)
    if missing:
        raise BundleMissing(f"the bundle lacks {min(missing)} ({archive}): copy the bundle again")
    return others


def _archive_files(archive: Path) -> Iterator[tuple[str, TarMember, TarStream]]:
    """The files of an archive, which must be in at most one folder: name without it, member, and archive to read from.

    Raises:
        BundleMissing, BundleCorrupt: the archive cannot be read, or is damaged or hostile.
    """
    folders: set[PurePosixPath] = set()
    names: set[str] = set()
    with contextlib.ExitStack() as stack:
        with _reading(archive):
            tar = stack.enter_context(open_tar(archive, max_bytes=MAX_ARCHIVE_BYTES, max_members=MAX_ARCHIVE_MEMBERS))
            members = iter(tar)
        while True:
            with _reading(archive):
                member = next(members, None)
            if member is None:
                return
            if member.kind == "directory":
                continue
            path = PurePosixPath(member.name.lstrip("/"))
            folders.add(path.parent)
            if not path.name or ".." in path.parts or len(path.parts) > 2 or len(folders) > 1 or path.name in names:
                raise BundleCorrupt(
                    f"{archive} contains {member.name!r}: a bundle has regular files in one folder, each once; "
                    "do not install archives from unknown sources"
                )
            names.add(path.name)
            yield path.name, member, tar


def _check_size(path: Path, size: int, recorded: int) -> None:
    if size != recorded:
        raise BundleCorrupt(f"{path} has {size} bytes instead of {recorded}: copy it again")


def _write(read: Callable[[int], bytes], size: int, target: Path, source: Path) -> None:
    """Write the `size` bytes that `read` returns to `target`; `source`, from which it reads, is named in errors."""
    with target.open("xb") as written:
        while size:
            with _reading(source):
                chunk = read(min(size, READ_CHUNK_BYTES))
            if not chunk:
                raise BundleCorrupt(f"{source} became shorter while it was copied: copy it again")
            written.write(chunk)
            size -= len(chunk)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Raise BundleError for what fails while `source` is read."""
    try:
        yield
    except ArchiveError as error:
        raise BundleCorrupt(
            f"{source} is neither a bundle's directory nor an intact .tar, .tar.gz, .tar.bz2 or .tar.xz of one "
            f"({error}): get it again from its maker"
        ) from None
    except OSError as error:
        raise BundleMissing(f"cannot read {source}: {error.strerror}") from None
