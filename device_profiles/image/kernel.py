"""The kernel of an image: its packages unpacked, its modules thinned out, and an initial RAM disk of busybox.

The packages are not installed: their scripts would build Debian's own initial RAM disk under emulation, which takes
long, and starts twice as slowly as this one. A new kernel comes with a new image.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from device_profiles.image.packages import SUITE, PackageArchive, PackageFile
from device_profiles.image.programs import ImageError, run
from device_profiles.image.recipe import INITRD_MODULES, KEPT_MODULES, LEFT_OUT_MODULES, KernelPackage

KERNEL_FILES = re.compile(r"linux-(image|binary|modules|base|dtbs?)-\d")
MODULE_DIRECTORIES = ("usr/lib/modules", "lib/modules")
BUSYBOX_COMMANDS = (
    *("cat", "echo", "find", "findfs", "grep", "mkdir", "modprobe", "mount", "reboot", "sh", "sleep", "sort"),
    *("switch_root", "xargs"),
)
# Names of modules that no hardware asks for.
ALWAYS_LOADED = "ext4 crc32c_generic crc32c-cryptoapi"
INIT = f"""\
#!/bin/sh
# Mounts the root file system that the kernel's command line names (root=LABEL=...), read-only, and starts its init.
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
root=$(grep -o 'root=LABEL=[^ ]*' /proc/cmdline)
root=${{root#root=}}
for module in {ALWAYS_LOADED}; do modprobe -q $module; done
attempts=0
until device=$(findfs "$root" 2>/dev/null); do
    # Devices appear one after the other: a driver finds a bus, and another one what is on it.
    find /sys/devices -name modalias -exec cat {{}} + 2>/dev/null | sort -u | xargs modprobe -a -q -b 2>/dev/null
    attempts=$((attempts + 1))
    if [ $attempts -gt 300 ]; then
        echo "flexspec: no file system has the $root; is the card complete? restarting in 30 s" >/dev/console
        sleep 30
        reboot -f
    fi
    sleep 0.2
done
mount -t ext4 -o ro "$device" /root
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root /sbin/init
"""


class Kernel(NamedTuple):
    """An unpacked kernel.

    Attributes:
        release: such as 6.12.48+deb13-arm64.
        modules: directory of its modules, of the name `release`.
        device_trees: directory with device trees, in subdirectories.
    """

    release: str
    image: Path
    modules: Path
    device_trees: Path


def unpack_kernel(archive: PackageArchive, package: KernelPackage, directory: Path) -> tuple[Kernel, list[PackageFile]]:
    """Download a kernel's packages, and unpack them into `directory`; leave out modules that boards do not need."""
    resolved = archive.resolve([package.package], package.suite if package.suite != SUITE else "")
    files = [file for file in resolved if KERNEL_FILES.match(file.package)]
    unpack(archive, files, directory)
    releases = [path for name in MODULE_DIRECTORIES for path in (directory / name).glob("*") if path.is_dir()]
    if len(releases) != 1:
        names = ", ".join(file.name for file in files)
        raise ImageError(f"the packages {names} hold the modules of {len(releases)} kernels instead of one")
    release = releases[0].name
    # depmod looks below lib/modules.
    modules = directory / "lib/modules" / release
    if releases[0] != modules:
        modules.parent.mkdir(parents=True)
        releases[0].rename(modules)
    _thin_out(modules / "kernel")
    run(["depmod", "--basedir", directory, release])
    kernel = Kernel(
        release,
        image=_first(directory, f"boot/vmlinuz-{release}", f"lib/modules/{release}/vmlinuz"),
        modules=modules,
        device_trees=_first(directory, f"lib/modules/{release}/dtb", f"usr/lib/linux-image-{release}"),
    )
    return kernel, files


def unpack(archive: PackageArchive, files: Sequence[PackageFile], directory: Path) -> None:
    """Unpack package files into `directory`, without running their scripts."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in archive.download(files):
        run(["dpkg-deb", "--extract", path, directory])


def build_initrd(kernel: Kernel, busybox: Path, scratch: Path) -> bytes:
    """Return an initial RAM disk that finds the root file system by its label: a compressed cpio archive."""
    tree = scratch / "initrd"
    modules = tree / "lib/modules" / kernel.release
    modules.mkdir(parents=True)
    for module in sorted(_with_dependencies(kernel.modules, INITRD_MODULES)):
        # busybox does not decompress modules itself.
        target = modules / module.removesuffix(".xz")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = (kernel.modules / module).read_bytes()
        target.write_bytes(lzma.decompress(data) if module.endswith(".xz") else data)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy(kernel.modules / name, modules)
    run(["depmod", "--basedir", tree, kernel.release])
    for path in modules.glob("modules.*"):
        # busybox reads the text files only.
        if path.suffix == ".bin" or path.name.startswith("modules.builtin"):
            path.unlink()
    for name in ("bin", "dev", "proc", "sys", "root"):
        (tree / name).mkdir()
    shutil.copy(busybox, tree / "bin/busybox")
    for name in BUSYBOX_COMMANDS:
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    # The kernel's messages and those of `init` need it before devtmpfs is mounted.
    entries = [*_cpio_tree(tree), _cpio_entry("dev/console", 0o020600, device=(5, 1))]
    return gzip.compress(b"".join([*entries, _cpio_entry("TRAILER!!!", 0)]), 9, mtime=0)


def _first(directory: Path, *names: str) -> Path:
    """Return the first of these that exists: Debian's packages changed their layout with Linux 7."""
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise ImageError(f"the packages of the kernel hold none of {', '.join(names)}")


def _thin_out(modules: Path) -> None:
    kept = {modules / name for name in KEPT_MODULES}
    for directory in LEFT_OUT_MODULES:
        for path in sorted((modules / directory).rglob("*.ko*")):
            if path.with_suffix("") not in kept and path not in kept:
                path.unlink()


def _with_dependencies(modules: Path, selected: Iterable[str]) -> set[str]:
    """Return the paths, relative to `modules`, of modules and of all that they depend on.

    Args:
        selected: modules or directories of them, relative to `kernel/`; what does not exist is built into the kernel.
    """
    dependencies = dict(_dependencies(modules))
    prefixes = tuple(f"kernel/{name}" if name.endswith(".ko") else f"kernel/{name}/" for name in selected)
    pending = [name for name in dependencies if name.startswith(prefixes)]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += dependencies[name]
    return found


def _dependencies(modules: Path) -> Iterator[tuple[str, list[str]]]:
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        yield name, rest.split()


def _cpio_tree(tree: Path) -> Iterator[bytes]:
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            yield _cpio_entry(name, 0o120777, str(path.readlink()).encode())
        elif path.is_dir():
            yield _cpio_entry(name, 0o040755)
        else:
            yield _cpio_entry(name, 0o100755 if path.stat().st_mode & 0o100 else 0o100644, path.read_bytes())


def _cpio_entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Return an entry in the "newc" format that the kernel unpacks; everything belongs to root and has the time 0."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
