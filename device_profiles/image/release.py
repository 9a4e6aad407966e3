"""Makes what a release consists of: `make release`.

    flexspec-VERSION-py3-none-any.whl            for any machine
    flexspec-VERSION-wheels-aarch64.tar          wheels of a board, and requirements.txt with hashes
    flexspec-VERSION-aarch64.update              for `edge-runtime update install`
    bundle.tar.gz                                the draft of the example family
    SHA256SUMS, SHA256SUMS.sig                   checksums, and their Ed25519 signature if there is a key

Whoever has the maker's public key checks the signature, and with it all files:

    openssl pkeyutl -verify -pubin -inkey maker.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig
    sha256sum --check --quiet SHA256SUMS

The wheels are those of `wheels.lock`, so `pip` needs no index and no network:

    tar -xf flexspec-VERSION-wheels-aarch64.tar
    python3 -m venv /opt/flexspec
    /opt/flexspec/bin/pip install --no-index --no-deps --require-hashes --find-links wheels -r wheels/requirements.txt
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from device_profiles.image.archives import new_archive
from device_profiles.image.build import default_epoch, file_hash
from device_profiles.image.customise import archive_bundle
from device_profiles.image.programs import run
from device_profiles.image.runtime import (
    CHECKOUT,
    FIRST_SLOT,
    LOCK,
    PYTHON_VERSION,
    TARGET,
    build_runtime,
    build_wheel,
)
from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import FlexSpecError, InputError
from edge_runtime.updates.package import DESCRIPTION_NAME, RUNTIME_NAME, SIGNATURE_NAME, UpdateDescription

MACHINE = "aarch64"
SUMS = "SHA256SUMS"
EXAMPLE_BUNDLE = CHECKOUT / "export/example_family/bundle"


def make_release(output: Path, bundle: Path, key: Ed25519PrivateKey | None, epoch: int) -> list[Path]:
    """Write a release into `output`. Returns its files.

    Raises:
        ImageError: a wheel cannot be built or downloaded.
        BundleError: the bundle cannot be read.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flexspec-release-") as name:
        scratch = Path(name)
        wheel = build_wheel(scratch, epoch)
        version = wheel.name.split("-")[1]
        files = [Path(shutil.copy(wheel, output))]
        files.append(_wheelhouse(wheel, output / f"flexspec-{version}-wheels-{MACHINE}.tar", scratch, epoch))
        files.append(_update(wheel, output / f"flexspec-{version}-{MACHINE}.update", scratch, key, epoch))
        files.append(Path(shutil.copy(archive_bundle(bundle, scratch, epoch), output / "bundle.tar.gz")))
    sums = output / SUMS
    sums.write_text("".join(f"{file_hash(path)}  {path.name}\n" for path in files))
    files.append(sums)
    if key is not None:
        signature = sums.with_name(f"{SUMS}.sig")
        signature.write_bytes(key.sign(sums.read_bytes()))
        files.append(signature)
    return files


def _wheelhouse(wheel: Path, target: Path, scratch: Path, epoch: int) -> Path:
    directory = scratch / "wheels"
    directory.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    run([*pip, *TARGET, "--require-hashes", "--requirement", LOCK])
    shutil.copy(wheel, directory)
    own = f"flexspec=={wheel.name.split('-')[1]} --hash=sha256:{file_hash(wheel)}\n"
    (directory / "requirements.txt").write_text(LOCK.read_text(encoding="utf-8") + own, encoding="utf-8")
    with new_archive(target, epoch) as archive:
        archive.tree(directory, "wheels")
    return target


def _update(wheel: Path, target: Path, scratch: Path, key: Ed25519PrivateKey | None, epoch: int) -> Path:
    plain = scratch / "runtime.tar"
    build_runtime(wheel, plain, epoch=epoch, compiler=[], say=print)
    return pack_update(plain, wheel.name.split("-")[1], target, key, epoch)


def pack_update(plain: Path, version: str, target: Path, key: Ed25519PrivateKey | None, epoch: int) -> Path:
    """Write the update `target` from the archive of a runtime, beside which it is compressed. Returns `target`."""
    runtime = plain.with_name(RUNTIME_NAME)
    prefix = f"{FIRST_SLOT[1:]}/"
    with (
        tarfile.open(plain) as source,
        runtime.open("wb") as raw,
        # Neither a name nor a time in the header, so that the same inputs make the same update.
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        # Boards refuse the longer headers of other formats.
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as inner,
    ):
        for entry in source:
            if entry.name.startswith(prefix):
                content = source.extractfile(entry) if entry.isreg() else None
                inner.addfile(entry.replace(name=entry.name.removeprefix(prefix)), content)
    description = UpdateDescription(
        version=version, python=PYTHON_VERSION, machine=MACHINE, runtime_sha256=file_hash(runtime)
    )
    text = msgspec.json.encode(description)
    with new_archive(target, epoch) as archive:
        archive.file(DESCRIPTION_NAME, text)
        if key is not None:
            archive.file(SIGNATURE_NAME, key.sign(text))
        archive.copy(runtime, RUNTIME_NAME)
    return target


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key of `draft-export keygen`. Raises InputError: it is none."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read the key {path}: {reason}; make one with `draft-export keygen`") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 key; make one with `draft-export keygen`")
    return key


def main() -> int:
    """Make a release. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("dist"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--bundle", type=Path, default=EXAMPLE_BUNDLE, metavar="DIR", help="default: the example family's"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="sign with this key, of `draft-export keygen`")
    options = parser.parse_args()
    try:
        key = read_key(options.key) if options.key else None
        files = make_release(options.output, options.bundle, key, default_epoch())
    except FlexSpecError as error:
        print_note(f"release: {error}")
        return error.exit_code
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
