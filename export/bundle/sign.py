"""Signs bundles with Ed25519 keys, so that boards can verify their origin.

The private key stays with the exporter; boards get the public key. `edge_runtime.bundles.signatures` defines the
signature.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edge_runtime.bundles.signatures import SIGNATURE, check_signature
from edge_runtime.protocol.bundle import MANIFEST_NAME, read_bundle
from edge_runtime.protocol.errors import InputError


def generate_key_pair(private_path: Path) -> Path:
    """Write a private key to `private_path`, readable by its owner only, and the public key next to it, both in PEM.

    Returns the path of the public key: `maker.pub` for `maker.key`, and for any other name the name with `.pub` added.

    Raises:
        InputError: one of the files exists or cannot be written.
    """
    stem = private_path.stem if private_path.suffix == ".key" else private_path.name
    public_path = private_path.with_name(f"{stem}.pub")
    key = Ed25519PrivateKey.generate()
    private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for path, content, mode in ((private_path, private_pem, 0o600), (public_path, public_pem, 0o644)):
        try:
            # O_EXCL with the final mode: never readable by others, not even briefly, and never over another key.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except FileExistsError:
            raise InputError(f"{path} exists, and a lost key cannot be restored; choose another name") from None
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
    return public_path


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Verify the files of the bundle in the directory `bundle` and sign it. Returns the path of the signature.

    Raises:
        BundleError: the bundle is incomplete or damaged.
        InputError: `key` is not a private key, or the signature cannot be written.
    """
    read_bundle(bundle)
    private = _read_private_key(key)
    signature = bundle / SIGNATURE
    scratch = signature.with_name(f".{SIGNATURE}")
    try:
        scratch.write_bytes(private.sign((bundle / MANIFEST_NAME).read_bytes()))
        scratch.replace(signature)
    except OSError as error:
        raise InputError(f"cannot write {signature}: {error.strerror}") from None
    check_signature(bundle, [private.public_key()])
    return signature


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise InputError(f"cannot read the key {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            f"{path} is not an Ed25519 private key in PEM without a password; `draft-export keygen` makes one"
        )
    return key
