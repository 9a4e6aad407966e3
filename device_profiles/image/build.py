"""Builds an image for a board: base, runtime, kernel and configuration become two file systems, and those a disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from device_profiles.image import disk
from device_profiles.image.archives import new_archive
from device_profiles.image.base_root import BASE_EPOCH, build_base
from device_profiles.image.block_map import fat_spans, map_image, write_block_map
from device_profiles.image.boot_files import boot_directory, radio_firmware
from device_profiles.image.build_python import python_of_debian
from device_profiles.image.kernel import build_initrd, unpack, unpack_kernel
from device_profiles.image.packages import Mirrors, PackageArchive
from device_profiles.image.programs import require, run
from device_profiles.image.recipe import MODEM_PACKAGES, PACKAGES, ImageRecipe
from device_profiles.image.runtime import CHECKOUT, LOCK, PYTHON_VERSION, build_runtime, build_wheel
from device_profiles.image.system_files import add_system_files, make_bundle_store

# Room for the kernel, and for what people put there: a draft bundle, certificates.
BOOT_BYTES = 256 * disk.MIB
# Debian packages that are unpacked on the boot partition or into /usr/lib/firmware, without their scripts.
FIRMWARE_PACKAGES, EFI_PACKAGES = ("raspi-firmware", "firmware-brcm80211"), ("systemd-boot-efi",)
DISK_FILES = ("disk.img", "boot.img", "root.img")
PROGRAMS = (
    "apt-get",
    "depmod",
    "dpkg-deb",
    "mkfs.vfat",
    "mcopy",
    "mke2fs",
    "debugfs",
    "dumpe2fs",
    "sfdisk",
    "tar",
    "xz",
)


class ImageOptions(NamedTuple):
    """What to build.

    Attributes:
        board: name of the recipe.
        output: the image; its block map, manifest and compressed form are written beside it.
        cache: directory for what later builds use again.
        mirrors: where Debian packages come from.
        pages: page size of the kernel; None for the recipe's.
        bundle: draft bundle, a directory or an archive; None for none.
        wheel: FlexSpec's wheel; None builds it from this checkout.
        modem: with ModemManager.
        epoch: time stamp of everything that is made here.
        compress: also write the image compressed.
    """

    board: str
    recipe: ImageRecipe
    output: Path
    cache: Path
    mirrors: Mirrors = Mirrors()
    pages: str | None = None
    bundle: Path | None = None
    wheel: Path | None = None
    modem: bool = False
    epoch: int = BASE_EPOCH
    compress: bool = True


class ImageManifest(msgspec.Struct, frozen=True):
    """What an image was made from; equal manifests belong to equal images.

    Attributes:
        kernel: release of the kernel.
        packages: file name and checksum of every Debian package.
        wheels_sha256: of the lock of the wheels.
        wheel_sha256: of FlexSpec's own wheel.
    """

    board: str
    epoch: int
    image_sha256: str
    image_bytes: int
    kernel: str
    wheels_sha256: str
    wheel_sha256: str
    bundle: str
    packages: dict[str, str]


def build_image(options: ImageOptions, say: Callable[[str], None]) -> ImageManifest:
    """Build an image. Returns what was written to `OUTPUT.json`.

    Raises:
        ImageError: a program is missing or failed; no image was written.
        BundleError: the bundle cannot be used.
    """
    require(*PROGRAMS)
    options.cache.mkdir(parents=True, exist_ok=True)
    recipe = options.recipe
    archive = PackageArchive(options.cache / "apt", options.mirrors)
    archive.update()
    packages = [*PACKAGES, *(MODEM_PACKAGES if options.modem else ())]
    base, base_files = build_base(archive, packages, options.mirrors, options.cache, say)
    # Beside the image, and not in /tmp, which may be memory.
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".flexspec-image-", dir=options.output.parent.resolve()) as name:
        scratch = Path(name)
        wheel = options.wheel or build_wheel(scratch, options.epoch)
        runtime = cached_runtime(wheel, base, options, say)
        say("kernel: unpacking, initial RAM disk")
        kernel, kernel_files = unpack_kernel(archive, recipe.kernel(options.pages), scratch / "kernel")
        extra = FIRMWARE_PACKAGES if recipe.raspberry_pi else EFI_PACKAGES
        extra_files = [archive.newest(package) for package in ("busybox-static", *extra)]
        unpack(archive, extra_files, scratch / "extra")
        initrd = build_initrd(kernel, scratch / "extra/usr/bin/busybox", scratch)
        boot_directory(recipe, kernel, initrd, scratch / "extra", scratch / "boot")
        store = make_bundle_store(options.bundle, scratch) if options.bundle else None
        with new_archive(scratch / "system.tar", options.epoch) as system:
            add_system_files(system, options.board, recipe, wheel.name.split("-")[1], store)
            for path in sorted(kernel.modules.rglob("*")):
                # Kernel and device trees are on the boot partition.
                if path != kernel.image and not path.is_relative_to(kernel.device_trees):
                    system.copy(path, f"usr/lib/modules/{path.relative_to(kernel.modules.parent)}")
            for path in radio_firmware(recipe, scratch / "extra"):
                system.copy(path, str(path.relative_to(scratch / "extra")))
        say("disk: file systems")
        image, boot, root = (scratch / name for name in DISK_FILES)
        disk.make_boot_file_system(boot, scratch / "boot", BOOT_BYTES, options.epoch)
        disk.make_root_file_system(root, [base, runtime, scratch / "system.tar"], scratch, options.epoch)
        disk.assemble(image, boot, root, options.epoch)
        manifest = ImageManifest(
            board=options.board,
            epoch=options.epoch,
            image_sha256=file_hash(image),
            image_bytes=image.stat().st_size,
            kernel=kernel.release,
            wheels_sha256=file_hash(LOCK),
            wheel_sha256=file_hash(wheel),
            bundle=next(store.glob("*@*")).name if store else "",
            packages={file.name: file.checksum for file in sorted([*base_files, *kernel_files, *extra_files])},
        )
        _publish(scratch, manifest, options, say)
    return manifest


def cached_runtime(wheel: Path, base: Path, options: ImageOptions, say: Callable[[str], None]) -> Path:
    """Return the tar archive of the runtime, from the cache if it was made from the same inputs before."""
    code = Path(__file__).with_name("runtime.py")
    inputs = " ".join([base.name, str(options.epoch), *map(file_hash, (wheel, LOCK, code))])
    path = options.cache / f"runtime-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.tar"
    if not path.exists():
        compiler = python_of_debian(PYTHON_VERSION, options.cache, options.mirrors)
        build_runtime(wheel, path, epoch=options.epoch, compiler=compiler, say=say)
    return path


def default_epoch() -> int:
    """Return $SOURCE_DATE_EPOCH, else the time of this checkout's last commit, else a constant."""
    if os.environ.get("SOURCE_DATE_EPOCH", "").isdecimal():
        return int(os.environ["SOURCE_DATE_EPOCH"])
    command = ["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return BASE_EPOCH


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(scratch: Path, manifest: ImageManifest, options: ImageOptions, say: Callable[[str], None]) -> None:
    """Write block map, manifest and the compressed image, and put everything into its place."""
    image, boot, root = (scratch / name for name in DISK_FILES)
    offset = disk.ALIGNMENT + boot.stat().st_size
    with image.open("rb") as file:
        spans = [(0, 512), *fat_spans(file, disk.ALIGNMENT)]
    spans += [(offset + start, size) for start, size in disk.ext4_spans(root)]
    image.with_name("bmap").write_text(write_block_map(map_image(image, spans)))
    image.with_name("json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    if options.compress:
        say("disk: compressing")
        run(["xz", "--keep", "--threads=2", "-6", image])
        image.with_name("disk.img.xz").replace(options.output.with_name(f"{options.output.name}.xz"))
    for name in ("bmap", "json"):
        image.with_name(name).replace(options.output.with_name(f"{options.output.name}.{name}"))
    image.replace(options.output)
