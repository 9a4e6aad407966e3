"""An arm64 system to run programs in, emulated by qemu-user: the base of our images, with two versions of Python.

Debian 13 has Python 3.13; 3.11 is Debian 12's, unpacked beside it. Programs see this checkout, read-only, and the
network of this machine; a /sys that is empty but for two processors (with the host's, onnxruntime's import crashes)
and a /proc/cpuinfo of an ARM processor, from which onnxruntime chooses its kernels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from device_profiles.image.base_root import build_base, enable_emulation
from device_profiles.image.build_python import python_of_debian
from device_profiles.image.kernel import unpack
from device_profiles.image.packages import Mirrors, PackageArchive
from device_profiles.image.programs import require, run
from device_profiles.image.recipe import PACKAGES
from device_profiles.image.runtime import CHECKOUT, PLATFORMS
from device_profiles.image.runtime import PYTHON_VERSION as SYSTEM_PYTHON
from tests.board_modules import OWN_PACKAGES, REQUIREMENTS
from tests.edge_runtime.conftest import export_tiny_bundle
from tests.models import save_target

PYTHON_VERSIONS = ("3.11", "3.13")
# Changes whenever this module makes another root from the same inputs.
FORMAT = "2"
OLD_PYTHON = ("libpython3.11-minimal", "libpython3.11-stdlib", "python3.11", "python3.11-minimal")
CPUINFO = "".join(
    f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp "
    "asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\n"
    "CPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
    for number in range(2)
)
# Arguments: the root, this checkout, the packages of a Python version, a /proc/cpuinfo; a command.
ENTER = """
root=$1 checkout=$2 packages=$3 cpuinfo=$4; shift 4
mount --make-rprivate /
mount --bind "$checkout" "$root/checkout"
mount -o remount,bind,ro "$root/checkout"
mount --bind "$packages" "$root/site-packages"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/sys"
mkdir -p "$root/sys/devices/system/cpu"
for file in possible present; do echo 0-1 >"$root/sys/devices/system/cpu/$file"; done
mount -t proc proc "$root/proc"
mount --bind "$cpuinfo" "$root/proc/cpuinfo"
mount --rbind /dev "$root/dev"
exec chroot "$root" /usr/bin/env -i -C /checkout "$@"
"""


class OldStable(Mirrors):
    """Debian 12, which has Python 3.11."""

    def sources(self, options: str = "") -> list[str]:
        return [
            f"deb {options} {self.debian} bookworm main",
            f"deb {options} {self.security} bookworm-security main",
        ]


class ArmRoot:
    """A root file system for arm64 programs, in a directory of the cache that later runs use again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def command(self, version: str, *words: str, environment: Mapping[str, str] = {}) -> list[str]:
        """Return the command that runs Python `version` with these arguments."""
        paths = [self._directory / "root", CHECKOUT, self._packages(version), self._directory / "cpuinfo"]
        variables = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/tmp",
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "/checkout:/site-packages",
            "PYTHONUNBUFFERED": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
            "FLEXSPEC_TEST_BUNDLES": "/bundles",
            "FLEXSPEC_WATCHDOG_LIMIT": "10",
            **environment,
        }
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        enter = ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "sh", "-e", "-c", ENTER, "sh"]
        return [
            *enter,
            *map(str, paths),
            *(f"{name}={value}" for name, value in variables.items()),
            f"python{version}",
            *words,
        ]

    def add_bundles(self) -> None:
        """Export the bundles of the tests of drafts: nothing in the root can."""
        bundles = self._directory / "root/bundles"
        shutil.rmtree(bundles, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="flexspec-arm-") as scratch:
            target = save_target(Path(scratch, "tiny"))
            for graph in ("fused", "concat"):
                export_tiny_bundle(target, graph, bundles / graph)

    def _packages(self, version: str) -> Path:
        return self._directory / f"packages-{version}"

    def install(self, version: str, requirements: Sequence[str]) -> None:
        """Install packages for a version of Python, and compile them and its standard library."""
        target = self._packages(version)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", "--target", target]
        pip += [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip += ["--python-version", version, "--only-binary=:all:", "--ignore-requires-python"]
        run([*pip, "--constraint", CHECKOUT / "constraints.txt", *requirements])
        self._compile(version, target, self._directory / f"root/usr/lib/python{version}")

    def compile_checkout(self, version: str) -> None:
        """Compile this checkout for a version of Python: programs in the root cannot write it."""
        self._compile(version, *(CHECKOUT / name for name in OWN_PACKAGES))

    def _compile(self, version: str, *places: Path) -> None:
        mirrors = {SYSTEM_PYTHON: Mirrors()}.get(version, OldStable())
        python = python_of_debian(version, self._directory.parent, mirrors)
        # A few files of packages and of Python's own tests are no valid Python; that is theirs.
        run(["sh", "-c", '"$@" || true', "sh", *python, "-m", "compileall", "-q", *places])


def prepare_root(cache: Path, say: Callable[[str], None]) -> ArmRoot:
    """Return a root with both versions of Python and the packages of the board's tests, from the cache if possible.

    Raises:
        ImageError: a program is missing, or arm64 programs do not run here.
    """
    require("unshare", "tar", "dpkg-deb")
    enable_emulation()
    # Any base will do: that there are newer packages is no reason to build one for half an hour.
    base = max(cache.glob("base-*.tar"), key=lambda path: path.stat().st_mtime, default=None)
    if base is None:
        archive = PackageArchive(cache / "apt", Mirrors())
        archive.update()
        base, _ = build_base(archive, PACKAGES, Mirrors(), cache, say)
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [entry.replace(" ", "") for entry in (*project["dependencies"], *REQUIREMENTS)]
    inputs = [FORMAT, base.name, *requirements, (CHECKOUT / "constraints.txt").read_text()]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
    directory = cache / f"arm-{key}"
    root = ArmRoot(directory)
    if not (directory / "cpuinfo").exists():
        say(f"root: unpacking {base.name}")
        _unpack(base, directory, cache)
        for version in PYTHON_VERSIONS:
            say(f"root: packages for Python {version}")
            root.install(version, requirements)
        # Last: a root without it is unfinished.
        (directory / "cpuinfo").write_text(CPUINFO)
    return root


def _unpack(base: Path, directory: Path, cache: Path) -> None:
    root = directory / "root"
    root.mkdir(parents=True, exist_ok=True)
    run(["tar", "--extract", "--file", base, "--directory", root, "--exclude=./dev/*", "--no-same-owner"])
    old = PackageArchive(cache / "apt-bookworm", OldStable())
    old.update()
    unpack(old, [old.newest(package) for package in OLD_PYTHON], root)
    for name in ("checkout", "site-packages"):
        (root / name).mkdir(exist_ok=True)
