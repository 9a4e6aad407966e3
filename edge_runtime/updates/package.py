"""An update as a file: a tar archive of the runtime with a signed description, in this order:

update.json       version, Python and architecture that it is for, and the SHA-256 of the runtime
update.sig        the 64 bytes of an Ed25519 signature over update.json; optional
runtime.tar.gz    the content of the virtual environment's directory

Nothing is written before the signature is verified, where one is demanded, and the runtime has the signed checksum.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import msgspec

from edge_runtime.common.tar_stream import CHUNK_BYTES, ArchiveError, TarMember, TarStream, open_tar
from edge_runtime.protocol.errors import FlexSpecError, InputError

# Imported lazily: boards without a key do not need the library.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

DESCRIPTION_NAME, SIGNATURE_NAME, RUNTIME_NAME = "update.json", "update.sig", "runtime.tar.gz"
# Chosen: a description has a few hundred bytes.
MAX_SMALL_FILE_BYTES = 1 << 16
# Chosen: the runtime of a board takes about 300 MB in 6,000 files.
MAX_RUNTIME_BYTES = 1 << 31
MAX_RUNTIME_MEMBERS = 100_000


class UpdateError(FlexSpecError):
    """An update cannot be used, or did not become ready. The message says which version is in use."""


# Appears in messages, which it cannot disturb.
Word = Annotated[str, msgspec.Meta(pattern=r"\A[ -~]{1,100}\Z")]


class UpdateDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an update is.

    Attributes:
        version: FlexSpec's.
        python: such as 3.13.
        machine: such as aarch64.
        runtime_sha256: of `runtime.tar.gz`, in hexadecimal.
    """

    version: Word
    python: Word
    machine: Word
    runtime_sha256: Word


def read_update(archive: Path, public_keys: Path | None) -> UpdateDescription:
    """Read and check the description of an update; with keys, also that one of them has signed it.

    Raises:
        InputError: the archive or the keys cannot be read.
        UpdateError: it is damaged, for another kind of board, or not signed by one of the keys.
    """
    from edge_runtime.bundles.signatures import read_public_keys

    with _opened(archive) as tar:
        text = _read_small(tar, DESCRIPTION_NAME)
        if public_keys is not None:
            _check_signature(text, _read_small(tar, SIGNATURE_NAME), read_public_keys(public_keys), archive)
    try:
        description = msgspec.json.decode(text, type=UpdateDescription)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UpdateError(f"{archive} is not an update: {error}; nothing was changed") from None
    own = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine()
    if (description.python, description.machine) != own:
        raise UpdateError(
            f"{archive} is for Python {description.python} on {description.machine}, and this board has {own[0]} on "
            f"{own[1]}; nothing was changed"
        )
    return description


def unpack_update(archive: Path, description: UpdateDescription, directory: Path) -> None:
    """Unpack the runtime of an update into a new directory. Raises OSError, UpdateError: it is damaged."""
    digest = hashlib.sha256()
    with _opened(archive) as tar:
        _find(tar, RUNTIME_NAME)
        while chunk := tar.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != description.runtime_sha256:
        raise UpdateError(f"{archive} is damaged: its runtime has another checksum; nothing was changed")
    directory.mkdir(mode=0o755)
    with _opened(archive) as tar:
        _find(tar, RUNTIME_NAME)
        with gzip.GzipFile(fileobj=tar) as content:  # type: ignore[call-overload]  # it reads, and does nothing else
            _unpack(
                TarStream(content, max_bytes=MAX_RUNTIME_BYTES, max_members=MAX_RUNTIME_MEMBERS, links=True), directory
            )


def _unpack(runtime: TarStream, directory: Path) -> None:
    """Unpack files, directories and symbolic links. Links come last, so that nothing is written through one.

    Raises ArchiveError, and OSError if writing fails.
    """
    links: dict[Path, str] = {}
    for member in runtime:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise ArchiveError(f"{member.name[:200]!r} is outside of it")
        place = directory / path
        if member.kind == "directory":
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if member.kind == "link":
            links[place] = member.target
            continue
        with place.open("xb") as file:
            while chunk := runtime.read(CHUNK_BYTES):
                file.write(chunk)
        # As `tarfile`'s filter "tar": without set-user-id bits, and writable for nobody else.
        place.chmod(member.mode & 0o755)
    for place, target in links.items():
        place.symlink_to(target)


def _check_signature(text: bytes, signature: bytes, keys: Sequence[Ed25519PublicKey], archive: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    for key in keys:
        with contextlib.suppress(InvalidSignature):
            key.verify(signature, text)
            return
    raise UpdateError(f"{archive} is not signed by a configured key; nothing was changed")


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[TarStream]:
    try:
        with open_tar(archive, max_bytes=MAX_RUNTIME_BYTES, max_members=3) as tar:
            yield tar
    except FileNotFoundError:
        raise InputError(f"there is no update at {archive}") from None
    except ArchiveError as error:
        raise UpdateError(f"{archive} is damaged, or no update ({error}); nothing was changed") from None


def _find(tar: TarStream, name: str) -> TarMember:
    """The member `name`, before which there may only be small ones. Raises ArchiveError."""
    for member in tar:
        if member.name == name:
            return member
        if member.name not in (DESCRIPTION_NAME, SIGNATURE_NAME):
            break
    raise ArchiveError(f"it has no {name}, or not in its place")


def _read_small(tar: TarStream, name: str) -> bytes:
    if _find(tar, name).size > MAX_SMALL_FILE_BYTES:
        raise ArchiveError(f"its {name} is too large")
    return tar.read(MAX_SMALL_FILE_BYTES)
