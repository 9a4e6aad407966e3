"""Debian's Python for this machine, of the version that boards have: byte code is the same for every processor.

Compiling the runtime with the board's own Python, under emulation, takes minutes; with this one, seconds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from device_profiles.image.kernel import unpack
from device_profiles.image.packages import Mirrors, PackageArchive
from device_profiles.image.programs import ImageError, run

# Packages that `compileall` needs in addition to Python's own.
LIBRARIES = ("libc6", "libexpat1", "zlib1g")


def python_of_debian(version: str, cache: Path, mirrors: Mirrors) -> list[str]:
    """Return the command of Python `version`, unpacked into `cache` from packages of Debian for this machine.

    Args:
        version: of the Python in the suites of `mirrors`, such as 3.13.

    Raises:
        ImageError: the packages cannot be downloaded.
    """
    machine = run(["dpkg", "--print-architecture"]).stdout.strip()
    archive = PackageArchive(cache / f"apt-{machine}-{version}", mirrors, machine)
    archive.update()
    python = f"python{version}"
    files = [
        archive.newest(name)
        for name in (f"{python}-minimal", f"lib{python}-minimal", f"lib{python}-stdlib", *LIBRARIES)
    ]
    key = hashlib.sha256("\n".join(file.checksum for file in files).encode()).hexdigest()[:16]
    root = cache / f"python-{key}"
    if not root.exists():
        unfinished = root.with_name(f"{root.name}.unfinished")
        unpack(archive, files, unfinished)
        unfinished.rename(root)
    loaders = [path for name in ("lib*", "usr/lib*") for path in root.glob(f"{name}/**/ld-linux*.so.*")]
    if not loaders:
        raise ImageError(f"Debian's packages for {machine} hold no ld-linux.so; remove {root} and repeat")
    loader = loaders[0]
    libraries = ":".join(str(path) for name in ("lib", "usr/lib") for path in root.glob(f"{name}/*-linux-gnu*"))
    return ["env", f"PYTHONHOME={root / 'usr'}", str(loader), "--library-path", libraries, f"{root}/usr/bin/{python}"]
