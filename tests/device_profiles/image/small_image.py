"""A small image with the file systems of real ones, for tests."""

from __future__ import annotations

from pathlib import Path

from device_profiles.image import disk
from device_profiles.image.archives import new_archive
from device_profiles.image.block_map import BlockMap, fat_spans, map_image
from tests.device_profiles.programs import require_programs

EPOCH = 1_760_000_000
# mkfs.vfat makes FAT32 file systems of at least 33 MB.
BOOT_BYTES = 40 * disk.MIB


def build_small_image(directory: Path) -> tuple[Path, BlockMap]:
    """Build an image in a new directory. Returns it with its block map. Skips the test if a program is missing."""
    require_programs("mkfs.vfat", "mcopy", "mke2fs", "debugfs", "sfdisk")
    boot = directory / "boot"
    (boot / "overlays").mkdir(parents=True)
    for name, text in {
        "config.txt": "arm_64bit=1\n",
        "user-data": "#cloud-config\n",
        "overlays/README": "x" * 9000,
    }.items():
        (boot / name).write_text(text)
    with new_archive(directory / "base.tar", EPOCH) as archive:
        archive.directory("etc")
        archive.directory("root", 0o700)
        archive.file("etc/hostname", "debian\n")
        archive.file("etc/shadow", "root:*:\n", 0o640)
        archive.file("usr/zeros", bytes(300_000))
        archive.link("lib", "usr/lib")
        archive.directory("usr/lib")
    with new_archive(directory / "system.tar", EPOCH) as archive:
        archive.file("etc/hostname", "flexspec\n")
        archive.file("lib/module", bytes(range(256)) * 300)
    disk.make_boot_file_system(directory / "boot.img", boot, BOOT_BYTES, EPOCH)
    archives = [directory / "base.tar", directory / "system.tar"]
    disk.make_root_file_system(directory / "root.img", archives, directory, EPOCH)
    image = directory / "disk.img"
    disk.assemble(image, directory / "boot.img", directory / "root.img", EPOCH)
    with image.open("rb") as file:
        spans = [(0, 512), *fat_spans(file, disk.ALIGNMENT)]
    spans += [(disk.ALIGNMENT + BOOT_BYTES + offset, size) for offset, size in disk.ext4_spans(directory / "root.img")]
    return image, map_image(image, spans)
