"""Runs the programs that images are made with, and says which package brings a missing one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.protocol.errors import FlexSpecError

# Program, and the Debian package that it is in, unless that has the same name.
PACKAGES = {
    "bmaptool": "bmap-tools",
    "e2fsck": "e2fsprogs",
    "fsck.vfat": "dosfstools",
    "qemu-system-aarch64": "qemu-system-arm",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "systemd-analyze": "systemd",
    "apt-get": "apt",
    "apt-cache": "apt",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "dumpe2fs": "e2fsprogs",
    "mcopy": "mtools",
    "mdel": "mtools",
    "mmd": "mtools",
    "mdir": "mtools",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "modinfo": "kmod",
    "newuidmap": "uidmap",
    "qemu-aarch64-static": "qemu-user-static",
    "resize2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "unshare": "util-linux",
    "xz": "xz-utils",
    "zstd": "zstd",
}
# Debian's PATH for users omits these, where mkfs.vfat, sfdisk and depmod are.
ADMINISTRATION_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
# Characters of a failed program's output that an error quotes. Chosen: the cause is usually in the last lines.
MAX_QUOTED = 2000


class ImageError(FlexSpecError):
    """An image could not be built or changed."""


def search_path() -> str:
    """Return PATH with the directories for administration."""
    return f"{os.environ.get('PATH', os.defpath)}:{ADMINISTRATION_PATH}"


def require(*programs: str) -> None:
    """Raise ImageError, naming the packages to install, unless all `programs` exist."""
    path = search_path()
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(program, program) for program in missing}))
        raise ImageError(f"{', '.join(missing)} not found; install it with `sudo apt install {packages}`")


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, input: str | None = None, **keywords: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return its output as text. Raises ImageError: it is missing, or failed."""
    done = run_binary(command, env=env, input=None if input is None else input.encode(), **keywords)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(errors="replace"), "")


def run_binary(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, input: bytes | None = None, **keywords: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, and return its output as bytes. Raises ImageError: it is missing, or failed."""
    words = [str(word) for word in command]
    require(words[0])
    environment = {**(env if env is not None else os.environ), "PATH": search_path()}
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    done = subprocess.run(words, capture_output=True, env=environment, **source, **keywords)
    if done.returncode:
        output = (done.stderr or done.stdout).decode(errors="replace").strip()[-MAX_QUOTED:]
        raise ImageError(f"`{' '.join(words)[:200]}` failed with exit code {done.returncode}: {output}")
    return done
