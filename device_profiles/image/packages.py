"""Debian packages for boards: resolved and downloaded by apt with a configuration of its own.

Nothing here touches the packages of this machine, and nothing needs root. apt checks signatures and hashes.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from device_profiles.image.programs import ImageError, run

SUITE = "trixie"
ARCHITECTURE = "arm64"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
DEFAULT_SECURITY_MIRROR = "http://deb.debian.org/debian-security"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Firmware of the Raspberry Pi and of its radios is in non-free-firmware.
COMPONENTS = "main non-free-firmware"


class Mirrors(NamedTuple):
    """Where packages come from.

    Attributes:
        debian: the archive with the suites trixie, trixie-updates and trixie-backports.
        security: the archive with the suite trixie-security.
    """

    debian: str = DEFAULT_MIRROR
    security: str = DEFAULT_SECURITY_MIRROR

    def sources(self, options: str = "") -> list[str]:
        """Return the lines of sources.list; `options` such as `[signed-by=...]` follow the word `deb`."""
        prefix = f"deb {options} ".replace("  ", " ")
        suites = [(self.debian, suite) for suite in (SUITE, f"{SUITE}-updates", f"{SUITE}-backports")]
        suites.insert(2, (self.security, f"{SUITE}-security"))
        return [f"{prefix}{mirror} {suite} {COMPONENTS}" for mirror, suite in suites]


class PackageFile(NamedTuple):
    """One file of a package in the archive.

    Attributes:
        name: file name, which holds package, version and architecture.
        checksum: checksum as apt prints it, such as `SHA256:...`; identifies the content.
        size: in bytes.
    """

    name: str
    checksum: str
    size: int

    @property
    def package(self) -> str:
        """Name of the package."""
        return self.name.partition("_")[0]

    @property
    def version(self) -> str:
        """Version of the package."""
        return urllib.parse.unquote(self.name.split("_")[1])


class PackageArchive:
    """The packages of the mirrors, for one architecture: that of boards unless another one is given."""

    def __init__(self, cache: Path, mirrors: Mirrors, architecture: str = ARCHITECTURE) -> None:
        """Prepare apt's directories in `cache`. Call `update` before the first use."""
        self._cache = cache.resolve()
        for name in ("state/lists/partial", "cache/archives/partial", "etc", "debs"):
            (self._cache / name).mkdir(parents=True, exist_ok=True)
        status, sources = self._cache / "status", self._cache / "etc/sources.list"
        # apt assumes that nothing is installed yet.
        status.write_bytes(b"")
        sources.write_text("\n".join(mirrors.sources(f"[signed-by={KEYRING}]")) + "\n")
        options = {
            "Dir": self._cache,
            "Dir::State": "state",
            "Dir::State::status": status,
            "Dir::Cache": "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::ForceHash": "SHA256",
            "Acquire::Languages": "none",
        }
        self._options = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

    def update(self) -> None:
        """Read the package lists. Raises ImageError: a mirror cannot be reached, or its signature is wrong."""
        self._apt("update", "-qq", "--error-on=any")

    def resolve(self, packages: Sequence[str], suite: str = "") -> list[PackageFile]:
        """Return the files that installing `packages` on an empty system needs, dependencies included, sorted.

        Args:
            packages: names, or patterns of apt such as `?essential`.
            suite: suite to prefer, such as trixie-backports.
        """
        preferred = ["-t", suite] if suite else []
        return _parse_uris(self._apt("install", "-qq", "--print-uris", *preferred, *packages))

    def newest(self, package: str) -> PackageFile:
        """Return the newest file of one package, without dependencies."""
        [file] = _parse_uris(self._apt("download", "-qq", "--print-uris", package))
        return file

    def download(self, files: Sequence[PackageFile]) -> list[Path]:
        """Return the paths of package files, downloaded unless they are there already."""
        directory = self._cache / "debs"
        paths = [directory / file.name for file in files]
        # All at once: apt reads its lists at every start, which takes longer than a download.
        missing = [file for file, path in zip(files, paths, strict=True) if not path.exists()]
        if missing:
            names = [f"{file.package}={file.version}" for file in missing]
            self._apt("download", "-qq", *names, directory=directory)
        for path in paths:
            if not path.exists():
                raise ImageError(f"apt downloaded {path.name} under another name; remove {self._cache} and repeat")
        return paths

    def _apt(self, *arguments: str, directory: Path | None = None) -> str:
        # This machine's own sources and preferences stay out of it; its proxies and credentials do not.
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        return run(["apt-get", *self._options, *arguments], cwd=directory or self._cache, env=environment).stdout


def _parse_uris(output: str) -> list[PackageFile]:
    words = (line.split() for line in output.splitlines() if line.startswith("'"))
    return sorted(PackageFile(name, checksum, int(size)) for _, name, size, checksum in words)
