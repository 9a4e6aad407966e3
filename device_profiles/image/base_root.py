"""The base of an image's root file system: Debian, installed by mmdebstrap, cached by the packages that it consists of.

Maintainer scripts of arm64 packages run under qemu-user, which takes minutes; the result is a tar archive in the cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from device_profiles.image.packages import ARCHITECTURE, KEYRING, SUITE, Mirrors, PackageArchive, PackageFile
from device_profiles.image.programs import ImageError, require, run

# Time stamp of every file in the base that is newer: the release of Debian 13, 2025-08-09. A constant, so that the base
# depends on its packages only.
BASE_EPOCH = 1754697600
BINFMT = Path("/proc/sys/fs/binfmt_misc")
QEMU = "/usr/bin/qemu-aarch64-static"
# Header of an arm64 ELF file, and what of it counts; from qemu's qemu-binfmt-conf.sh. F: the kernel opens the emulator
# now, so that it is found inside other roots as well.
BINFMT_ENTRY = (
    rb":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    rb":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:" + QEMU.encode() + b":F"
)
# Documentation, except licenses; and translations.
EXCLUDED_PATHS = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*"),
    *("/usr/share/bug/*", "/usr/share/bash-completion/*", "/usr/share/zsh/*"),
)
INCLUDED_PATHS = ("/usr/share/doc/*/copyright",)
# Changes whenever this module builds something else from the same packages.
FORMAT = "1"


def base_key(files: Sequence[PackageFile]) -> str:
    """Return a name for the base that consists of these packages."""
    text = "\n".join([FORMAT, *EXCLUDED_PATHS, *(f"{file.name} {file.checksum}" for file in files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_base(
    archive: PackageArchive, packages: Sequence[str], mirrors: Mirrors, cache: Path, say: Callable[[str], None]
) -> tuple[Path, list[PackageFile]]:
    """Return the tar archive of a Debian system with `packages`, and the package files that it was made from.

    Takes it from `cache` if it has been built from the same packages before.

    Raises:
        ImageError: a program is missing, arm64 programs do not run here, or a package cannot be installed.
    """
    files = archive.resolve(["?essential", "apt", *packages])
    path = cache / f"base-{base_key(files)}.tar"
    if path.exists():
        say(f"base: {path.name} from the cache")
        return path, files
    # mmdebstrap asks arch-test whether arm64 programs run here; Debian only recommends it.
    require("mmdebstrap", "arch-test")
    enable_emulation()
    say(f"base: installing {len(files)} packages under emulation; takes minutes, once")
    unfinished = path.with_suffix(".unfinished")
    command = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--architectures={ARCHITECTURE}"]
    command += ["--dpkgopt=force-unsafe-io", f"--keyring={KEYRING}", f"--include={','.join(packages)}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED_PATHS]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in INCLUDED_PATHS]
    # Host keys belong to one board, and are made at its first boot.
    command += ['--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*', SUITE, str(unfinished)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(BASE_EPOCH), "LC_ALL": "C.UTF-8"}
    try:
        run([*command, *mirrors.sources()], env=environment, cwd="/")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path, files


def enable_emulation() -> None:
    """Make the kernel run arm64 programs with qemu-user. Raises ImageError: only root can, and the user is not."""
    if platform.machine() in ("aarch64", "arm64") or (BINFMT / "qemu-aarch64").exists():
        return
    require("qemu-aarch64-static")
    advice = "run `sudo apt install qemu-user-static binfmt-support`, or this command once as root"
    if os.geteuid() != 0:
        raise ImageError(f"this machine cannot run arm64 programs yet; {advice}")
    try:
        if not (BINFMT / "register").exists():
            run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT])
        (BINFMT / "register").write_bytes(BINFMT_ENTRY)
    except OSError as error:
        raise ImageError(f"cannot register qemu for arm64 programs: {error.strerror}; {advice}") from None
