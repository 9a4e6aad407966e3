"""Prepares a stock Raspberry Pi OS: its first boot installs the runtime and starts the service, without a network.

Raspberry Pi OS since trixie reads cloud-init's files from its boot partition. They call `install.sh`, which unpacks the
same runtime that our own images have, and then runs the same `device-profile configure`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from device_profiles.first_boot.board_file import FILE_NAME, SSH_KEY, read_board_file
from device_profiles.image.archives import new_archive
from device_profiles.image.boot_files import TEMPLATE
from device_profiles.image.boot_partition import open_boot_partition
from device_profiles.image.programs import run
from device_profiles.image.runtime import HOME, PYTHON_VERSION, build_runtime, build_wheel
from device_profiles.image.system_files import BOOT_DIRECTORY, CONFIGURE_UNIT
from edge_runtime.protocol.errors import InputError

# Everything of ours but flexspec.toml and bundle.tar.gz, which `device-profile configure` reads, is in this directory.
DIRECTORY = "flexspec"
RUNTIME_NAME, SCRIPT_NAME, UNIT_NAME = "runtime.tar.gz", "install.sh", "flexspec-configure.service"
BUNDLE_NAME = "bundle.tar.gz"
USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
INSTALL = f"""\
#!/bin/sh
# Installs FlexSpec on Raspberry Pi OS, without a network. Run once, by cloud-init at the first boot; may be run again.
set -eu
cd {BOOT_DIRECTORY}/{DIRECTORY}
if ! command -v python{PYTHON_VERSION} >/dev/null; then
    echo "flexspec: this system has no Python {PYTHON_VERSION}; use Raspberry Pi OS trixie, 64 bit" >/dev/console
    exit 1
fi
tar --extract --gzip --file {RUNTIME_NAME} --directory / --no-same-owner --keep-directory-symlink
# The service cannot write byte code itself.
{HOME}/bin/python -m compileall -q {HOME}/lib || true
install -m 644 {UNIT_NAME} /etc/systemd/system/
systemctl daemon-reload
systemctl enable {UNIT_NAME}
# Errors in flexspec.toml are reported by it; the service starts in any case, and takes them up after a correction.
{HOME}/bin/device-profile configure || true
{HOME}/bin/edge-runtime service install --now
"""
# Wi-Fi comes from flexspec.toml, which loses its password once it is stored; here it would stay on the card.
NETWORK_CONFIG = """\
network:
  version: 2
  ethernets:
    eth0:
      dhcp4: true
      optional: true
"""


class CustomiseOptions(NamedTuple):
    """What a stock system gets.

    Attributes:
        wheel: FlexSpec's wheel; None builds it from this checkout.
        bundle: draft bundle, a directory or an archive; None for none.
        configuration: flexspec.toml; None for one to fill in.
        user: name of the administrator.
        ssh_keys: files of public keys that may log in as that user.
        epoch: time stamp of everything that is made here.
    """

    wheel: Path | None = None
    bundle: Path | None = None
    configuration: Path | None = None
    user: str = "flexspec"
    ssh_keys: Sequence[Path] = ()
    epoch: int = 0


def customise(place: Path, options: CustomiseOptions, say: Callable[[str], None]) -> Iterator[str]:
    """Write everything that the first boot needs to a boot partition. Yields the names of the files.

    Args:
        place: an image file, or the directory where a boot partition is mounted.

    Raises:
        InputError: `place` is neither, or an option is wrong; nothing was written.
        ImageError: the runtime could not be made, or the partition is full.
    """
    partition = open_boot_partition(place)
    if partition.read("user-data") is None:
        raise InputError(
            f"{place} has no user-data: only Raspberry Pi OS since trixie reads cloud-init's files; older ones do not"
        )
    hostname, configuration = _configuration(options)
    keys = [_read_key(path) for path in options.ssh_keys]
    if not USER_NAME.fullmatch(options.user):
        raise InputError(f"{options.user!r} is not a name of a user; use at most 32 of a-z, 0-9, - and _")
    with tempfile.TemporaryDirectory(prefix="flexspec-customise-") as scratch:
        wheel = options.wheel or build_wheel(Path(scratch), options.epoch)
        runtime = make_runtime(wheel, Path(scratch), options.epoch, say)
        files: dict[str, bytes | Path] = {
            f"{DIRECTORY}/{RUNTIME_NAME}": runtime,
            f"{DIRECTORY}/{SCRIPT_NAME}": INSTALL.encode(),
            f"{DIRECTORY}/{UNIT_NAME}": CONFIGURE_UNIT.encode(),
            FILE_NAME: configuration,
            "user-data": user_data(options.user, keys, hostname).encode(),
            "network-config": NETWORK_CONFIG.encode(),
        }
        if options.bundle:
            files[BUNDLE_NAME] = archive_bundle(options.bundle, Path(scratch), options.epoch)
        # cloud-init runs again on a card whose instance has another id.
        files["meta-data"] = f"instance-id: flexspec-{_digest(files)}\n".encode()
        for name, content in files.items():
            partition.write(name, content)
            yield name


def make_runtime(wheel: Path, directory: Path, epoch: int, say: Callable[[str], None]) -> Path:
    """Return the runtime as a compressed archive."""
    path = directory / "runtime.tar"
    build_runtime(wheel, path, epoch=epoch, compiler=[], say=say)
    run(["gzip", "--no-name", "-6", path])
    return path.with_name(f"{path.name}.gz")


def user_data(user: str, keys: Sequence[str], hostname: str) -> str:
    """Return cloud-init's user-data: JSON, which is YAML, behind the line that cloud-init requires."""
    account = {
        "name": user,
        "groups": "users,adm,dialout,audio,netdev,video,plugdev,cdrom,games,input,gpio,spi,i2c,render,sudo",
        "shell": "/bin/bash",
        "lock_passwd": True,
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "ssh_authorized_keys": list(keys),
    }
    settings = {
        **({"hostname": hostname, "manage_etc_hosts": False} if hostname else {}),
        "ssh_pwauth": False,
        "users": [account],
        "runcmd": [["systemctl", "enable", "--now", "ssh"], ["sh", f"{BOOT_DIRECTORY}/{DIRECTORY}/{SCRIPT_NAME}"]],
    }
    return f"#cloud-config\n{json.dumps(settings, indent=2)}\n"


def _configuration(options: CustomiseOptions) -> tuple[str, bytes]:
    """Return the host name, and the text of flexspec.toml."""
    if options.configuration is None:
        return "", TEMPLATE.format(profile="").encode()
    file = read_board_file(options.configuration)
    return file.tables.board.hostname, options.configuration.read_bytes()


def _read_key(path: Path) -> str:
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"cannot read the public key {path}") from None
    if not SSH_KEY.fullmatch(key):
        raise InputError(f"{path} is not a public key; name the file that ends in .pub")
    return key


def archive_bundle(bundle: Path, scratch: Path, epoch: int) -> Path:
    """Return an archive of a bundle, which may be one already: the files that its manifest names, and its signature."""
    from edge_runtime.bundles.signatures import SIGNATURE
    from edge_runtime.protocol.bundle import MANIFEST_NAME, read_bundle

    if bundle.is_file():
        return bundle
    names = [MANIFEST_NAME, *read_bundle(bundle).manifest.files]
    with new_archive(scratch / "bundle.tar", epoch) as archive:
        for name in [*names, *([SIGNATURE] if (bundle / SIGNATURE).exists() else [])]:
            archive.file(name, (bundle / name).read_bytes())
    run(["gzip", "--no-name", "-6", scratch / "bundle.tar"])
    return scratch / BUNDLE_NAME


def _digest(files: dict[str, bytes | Path]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode())
        digest.update(content.read_bytes() if isinstance(content, Path) else content)
    return digest.hexdigest()[:16]
