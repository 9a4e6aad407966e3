"""Signs bundles, so that boards can tell whose they are: `draft-export keygen` and `sign`.

The private key stays with whoever exports; boards get the public one. `edge_runtime.bundles.signatures` says what a
signature is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

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
from edge_runtime.protocol.bundle import MANIFEST, read_bundle
from edge_runtime.protocol.errors import InputError


def make_key(output: Path) -> tuple[Path, Path]:
    """Makes a pair of keys in PEM, `output`.key for its owner's eyes and `output`.pub for boards; returns both paths.

    Raises:
        InputError: one of them exists, or cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    paths = output.with_name(f"{output.name}.key"), output.with_name(f"{output.name}.pub")
    for path, content, mode in zip(paths, (secret, public), (0o600, 0o644), strict=True):
        try:
            # Never readable by others, not even for a moment, and never over another key.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except FileExistsError:
            raise InputError(f"{path} exists, and a lost key cannot be made again; choose another name") from None
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
    return paths


def sign(bundle: Path, key: Path) -> Path:
    """Signs the bundle in the directory `bundle`, once its files are found right; returns the signature's path.

    Raises:
        BundleError: the bundle is not whole.
        InputError: `key` is not a private key, or the signature cannot be written.
    """
    read_bundle(bundle)
    private = _read_key(key)
    signature = bundle / SIGNATURE
    scratch = signature.with_name(f".{SIGNATURE}")
    try:
        scratch.write_bytes(private.sign((bundle / MANIFEST).read_bytes()))
        scratch.replace(signature)
    except OSError as error:
        raise InputError(f"cannot write {signature}: {error.strerror}") from None
    check_signature(bundle, [private.public_key()])
    return signature


def _read_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise InputError(f"cannot read the key {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is no Ed25519 private key in PEM without password; `draft-export keygen` makes one")
    return key


def add_parsers(commands: Any) -> None:
    """Adds `keygen` and `sign` to argparse's sub-parsers."""
    keygen = commands.add_parser("keygen", help="make a pair of keys to sign bundles with")
    keygen.add_argument("--output", type=Path, required=True, metavar="NAME", help="makes NAME.key and NAME.pub")
    keygen.set_defaults(run=_keygen)
    signing = commands.add_parser("sign", help="sign a bundle, so that boards can tell whose it is")
    signing.add_argument("bundle", type=Path, help="directory of the bundle")
    signing.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key, NAME.key of `keygen`")
    signing.set_defaults(run=_sign)


def _keygen(options: argparse.Namespace) -> int:
    private, public = make_key(options.output)
    print(f"{private}: keep it secret; {public}: for boards, as draft.public_key_file of their configuration")
    return 0


def _sign(options: argparse.Namespace) -> int:
    print(f"{sign(options.bundle, options.key)}: signed")
    return 0
