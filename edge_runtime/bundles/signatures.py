"""Bundle signatures: Ed25519 over the manifest, which records the hash of every other file.

    manifest.sig        the 64 signature bytes over the content of manifest.json

Keys are PEM files in OpenSSL's format. A file may hold several public keys: a signature by any of them is accepted, so
that a new key can be introduced before the old one is retired. `draft-export keygen` and `sign` make keys and
signatures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.protocol.bundle import MANIFEST_NAME
from edge_runtime.protocol.errors import BundleError, InputError

# Imported lazily: boards without a key do not need the library.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE = "manifest.sig"
# Length of an Ed25519 signature (RFC 8032).
SIGNATURE_BYTES = 64
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class BundleUntrusted(BundleError):
    """The bundle is not signed by a configured key."""


def read_public_keys(path: Path) -> list[Ed25519PublicKey]:
    """Read the public keys, at least one, from the PEM file at `path`. Raises InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        blocks = _PEM.findall(path.read_bytes())
        keys = [load_pem_public_key(block) for block in blocks]
    except OSError as error:
        raise InputError(f"cannot read the key {path}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        keys = []
    ed25519_keys = [key for key in keys if isinstance(key, Ed25519PublicKey)]
    if not ed25519_keys or len(ed25519_keys) < len(keys):
        raise InputError(f"{path} is not a file of Ed25519 public keys in PEM; make one with `draft-export keygen`")
    return ed25519_keys


def check_signature(bundle: Path, keys: list[Ed25519PublicKey]) -> None:
    """Verify that one of `keys` signed the manifest in the directory `bundle`.

    Raises:
        BundleUntrusted: see `verify_signature`; or a file cannot be read.
    """
    contents: dict[str, bytes] = {}
    for name in (MANIFEST_NAME, SIGNATURE):
        try:
            contents[name] = (bundle / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BundleUntrusted(f"cannot read the signature of {bundle}: {error.strerror}") from None
    verify_signature(contents.get(MANIFEST_NAME), contents.get(SIGNATURE), keys, bundle)


def verify_signature(
    manifest: bytes | None, signature: bytes | None, keys: list[Ed25519PublicKey], bundle: Path
) -> None:
    """Verify that `signature` is that of one of `keys` over `manifest`.

    Args:
        manifest, signature: contents of the two files; None for a file that the bundle does not have.
        bundle: its directory or archive, for messages.

    Raises:
        BundleUntrusted: the signature is missing, or is not one of these keys over this manifest.
    """
    from cryptography.exceptions import InvalidSignature

    if manifest is None or signature is None:
        raise BundleUntrusted(
            f"{bundle} is not signed: it has no {MANIFEST_NAME if manifest is None else SIGNATURE}, and a key is "
            "configured; sign it with `draft-export sign`, or get a signed copy"
        )
    for key in keys:
        try:
            key.verify(signature, manifest)
        except InvalidSignature:
            continue
        return
    raise BundleUntrusted(
        f"{bundle / SIGNATURE} is not the signature of this manifest by a configured key: "
        "the bundle was modified, or signed by someone else; do not use it"
    )
