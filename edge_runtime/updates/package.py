"""An update as a file: a tar archive of the runtime with a signed description.

update.json       version, Python and architecture that it is for, and the SHA-256 of the runtime
update.sig        the 64 bytes of an Ed25519 signature over update.json
runtime.tar.gz    the content of the virtual environment's directory
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from edge_runtime.protocol.errors import FlexSpecError, InputError

# Imported lazily: boards without a key do not need the library.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

DESCRIPTION_NAME, SIGNATURE_NAME, RUNTIME_NAME = "update.json", "update.sig", "runtime.tar.gz"
# Chosen: a description has a few hundred bytes.
MAX_SMALL_FILE_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20


class UpdateError(FlexSpecError):
    """An update cannot be used, or did not become ready. The message says which version is in use."""


class UpdateDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an update is.

    Attributes:
        version: FlexSpec's.
        python: such as 3.13.
        machine: such as aarch64.
        runtime_sha256: of `runtime.tar.gz`, in hexadecimal.
    """

    version: str
    python: str
    machine: str
    runtime_sha256: str


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
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
    directory.mkdir(mode=0o755)
    with _opened(archive) as tar:
        member = _member(tar, RUNTIME_NAME)
        digest = hashlib.sha256()
        while chunk := member.read(CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != description.runtime_sha256:
            raise UpdateError(f"{archive} is damaged: its runtime has another checksum; nothing was changed")
        member.seek(0)
        with tarfile.open(fileobj=member, mode="r:gz") as runtime:
            # Not the filter for data: the interpreter is a link to the system's Python, outside of the archive.
            runtime.extractall(directory, filter="tar")


def _check_signature(text: bytes, signature: bytes, keys: Sequence[Ed25519PublicKey], archive: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    for key in keys:
        with contextlib.suppress(InvalidSignature):
            key.verify(signature, text)
            return
    raise UpdateError(f"{archive} is not signed by a configured key; nothing was changed")


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except FileNotFoundError:
        raise InputError(f"there is no update at {archive}") from None
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UpdateError(f"{archive} is damaged, or no update ({error}); nothing was changed") from None


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    try:
        member = tar.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise UpdateError(f"{tar.name!s} is not an update: it has no {name}; nothing was changed")
    return member


def _read_small(tar: tarfile.TarFile, name: str) -> bytes:
    return _member(tar, name).read(MAX_SMALL_FILE_BYTES)
