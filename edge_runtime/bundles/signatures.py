"""Who made a bundle: an Ed25519 signature of its manifest, which in turn records the hash of every other file.

    manifest.sig        the 64 bytes of the signature over the bytes of manifest.json

Keys are PEM files as OpenSSL writes and reads them; a file of public keys may hold several, of which one must have
signed, so that a new key can be introduced before the old one is retired. `draft-export keygen` and `sign` make keys
and signatures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.protocol.bundle import MANIFEST
from edge_runtime.protocol.errors import BundleError, InputError

# Boards without a key should not pay for the library.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE = "manifest.sig"
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class BundleUntrusted(BundleError):
    """A bundle that no configured key has signed."""


def read_public_keys(path: Path) -> list[Ed25519PublicKey]:
    """The public keys in the PEM file at `path`, at least one. Raises InputError."""
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
    ours = [key for key in keys if isinstance(key, Ed25519PublicKey)]
    if not ours or len(ours) < len(keys):
        raise InputError(f"{path} is not a file of Ed25519 public keys in PEM; make one with `draft-export keygen`")
    return ours


def check_signature(bundle: Path, keys: list[Ed25519PublicKey]) -> None:
    """Returns if one of `keys` has signed the manifest in the directory `bundle`.

    Raises:
        BundleUntrusted: there is no signature, or it is somebody else's, or of another manifest.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        manifest, signature = (bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes()
    except FileNotFoundError as error:
        raise BundleUntrusted(
            f"{bundle} is not signed: it has no {Path(error.filename).name}, and a key is configured; "
            "sign it with `draft-export sign`, or get it from who did"
        ) from None
    except OSError as error:
        raise BundleUntrusted(f"cannot read the signature of {bundle}: {error.strerror}") from None
    for key in keys:
        try:
            key.verify(signature, manifest)
        except InvalidSignature:
            continue
        return
    raise BundleUntrusted(
        f"{bundle / SIGNATURE} is not the signature of this manifest by a configured key: "
        "the bundle was changed, or signed by somebody else; do not use it"
    )
