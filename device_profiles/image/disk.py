"""File systems and the partition table of an image, made in ordinary files: no loop devices, no mounts, no root.

The same files with the same `epoch` make the same image, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from device_profiles.image.programs import require, run

# Labels by which the board mounts its file systems, and the identifiers that would otherwise be random.
BOOT_LABEL, ROOT_LABEL = "FLEXBOOT", "flexroot"
NAMESPACE = uuid.UUID("5b1c3c0e-4d0f-4c7e-9c57-2f6e6b0c8f11")
MIB = 1 << 20
# Flash memory erases blocks of several MiB; partitions begin at a multiple of 4 MiB.
ALIGNMENT = 4 * MIB
# What the ext4 file system has beyond its files: room for journals and a first update until the board has grown it.
ROOT_SLACK, ROOT_MARGIN = 48 * MIB, 1.08
# The inode fields with times that mke2fs takes from the machine that it runs on.
INODE_TIMES = ("atime", "ctime", "crtime")
FIRST_INODE = 11

# Extracts archives into a new directory, and prints the bytes and the number of its files.
EXTRACT = """
umask 022; root=$1; epoch=$2; shift 2; mkdir "$root"
cd "$root"
for archive; do tar --extract --file "$archive" --numeric-owner --same-permissions --keep-directory-symlink; done
chmod 755 "$root"
# Directories that a later archive added files to.
find "$root" -newermt "@$epoch" -exec touch --no-dereference --date="@$epoch" {} +
du --summarize --bytes "$root"; find "$root" | wc --lines
"""


def make_boot_file_system(image: Path, files: Path, size: int, epoch: int) -> None:
    """Create a FAT32 file system of `size` bytes with the tree `files`. Raises ImageError: they do not fit, ..."""
    require("mkfs.vfat", "mcopy")
    image.unlink(missing_ok=True)
    with image.open("xb") as file:
        file.truncate(size)
    serial = f"{epoch & 0xFFFFFFFF:08x}"
    environment = _environment(epoch)
    run(["mkfs.vfat", "--invariant", "-F", "32", "-n", BOOT_LABEL, "-i", serial, image], env=environment)
    for path in files.rglob("*"):
        os.utime(path, (epoch, epoch))
    entries = sorted(files.iterdir())
    run(["mcopy", "-s", "-p", "-m", "-Q", "-i", image, *entries, "::"], env=environment)


def make_root_file_system(image: Path, archives: Sequence[Path], scratch: Path, epoch: int) -> None:
    """Create an ext4 file system with what the tar `archives` contain, the later ones over the earlier ones.

    Runs in a user namespace unless the user is root, so that files belong to whom the archives say.
    """
    require("mke2fs", "debugfs", "dumpe2fs", "tar")
    root = scratch.resolve() / "root"
    inside = _as_root()
    try:
        done = run([*inside, "sh", "-e", "-c", EXTRACT, "sh", root, str(epoch), *map(Path.resolve, archives)])
        size, count = (int(line.split()[0]) for line in done.stdout.splitlines())
        blocks = (int(size * ROOT_MARGIN) + 4096 * count + ROOT_SLACK) // ALIGNMENT + 1
        image.unlink(missing_ok=True)
        identifier = str(uuid.uuid5(NAMESPACE, f"{ROOT_LABEL} {epoch}"))
        command: list[str | Path] = [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-L",
            ROOT_LABEL,
            "-U",
            identifier,
            "-m",
            "1",
            "-d",
            root,
        ]
        # metadata_csum_seed and orphan_file are newer than the e2fsprogs of some boards.
        command += ["-O", "^metadata_csum_seed,^orphan_file", "-E"]
        command += [
            f"hash_seed={identifier},lazy_itable_init=0,lazy_journal_init=0",
            image,
            f"{blocks * ALIGNMENT >> 10}k",
        ]
        run([*inside, *command], env=_environment(epoch))
    finally:
        run([*inside, "rm", "-rf", root])
    _set_times(image, epoch)


def assemble(image: Path, boot: Path, root: Path, epoch: int) -> None:
    """Create a disk image with a partition table (MBR, which every Raspberry Pi reads) and both file systems."""
    require("sfdisk")
    boot_size, root_size = boot.stat().st_size, root.stat().st_size
    image.unlink(missing_ok=True)
    with image.open("xb") as file:
        file.truncate(ALIGNMENT + boot_size + root_size)
    sectors = [ALIGNMENT // 512, boot_size // 512, (ALIGNMENT + boot_size) // 512, root_size // 512]
    table = (
        f"label: dos\nlabel-id: 0x{epoch & 0xFFFFFFFF:08x}\nunit: sectors\n"
        f"start={sectors[0]}, size={sectors[1]}, type=c, bootable\nstart={sectors[2]}, size={sectors[3]}, type=83\n"
    )
    run(["sfdisk", "--quiet", "--no-reread", image], input=table)
    with image.open("r+b") as file:
        for source, offset in ((boot, ALIGNMENT), (root, ALIGNMENT + boot_size)):
            _copy_sparsely(source, file.fileno(), offset)


def partition_offset(image: Path, number: int = 1) -> tuple[int, int]:
    """Return offset and size of a primary partition of an image with an MBR, in bytes; (0, 0) if there is none."""
    with image.open("rb") as file:
        sector = file.read(512)
    if sector[510:512] != b"\x55\xaa":
        return 0, 0
    entry = sector[446 + 16 * (number - 1) :][:16]
    return int.from_bytes(entry[8:12], "little") * 512, int.from_bytes(entry[12:16], "little") * 512


def _copy_sparsely(source: Path, target: int, offset: int) -> None:
    """Copy the chunks of a file that are not zero."""
    zeros = bytes(MIB)
    with source.open("rb") as file:
        position = offset
        while chunk := file.read(MIB):
            if chunk != zeros[: len(chunk)]:
                os.pwrite(target, chunk, position)
            position += len(chunk)


def ext4_spans(image: Path) -> list[tuple[int, int]]:
    """Return offset and size in bytes of everything that an ext4 file system uses."""
    listing = run(["dumpe2fs", image]).stdout
    count, block = (
        int(re.findall(rf"^{name}: +(\d+)", listing, re.MULTILINE)[0]) for name in ("Block count", "Block size")
    )
    spans, position = [], 0
    for first, last in [*_free_ranges(listing, "blocks"), (count, count)]:
        if first > position:
            spans.append((position * block, (first - position) * block))
        position = last + 1
    return spans


def _free_ranges(listing: str, what: str) -> Iterator[tuple[int, int]]:
    """Yield the first and last free inode or block of every range, as dumpe2fs lists them for every group."""
    for ranges in re.findall(rf"^  Free {what}: (\d.*)$", listing, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges):
            yield int(first), int(last or first)


def _set_times(image: Path, epoch: int) -> None:
    """Set the times that mke2fs took from the files of this machine, in all inodes that are in use."""
    listing = run(["dumpe2fs", image]).stdout
    inodes = int(re.findall(r"^Inode count: +(\d+)", listing, re.MULTILINE)[0])
    free = {inode for first, last in _free_ranges(listing, "inodes") for inode in range(first, last + 1)}
    used = [2, *(inode for inode in range(FIRST_INODE, inodes + 1) if inode not in free)]
    commands = [f"set_inode_field <{inode}> {field} @{epoch}" for inode in used for field in INODE_TIMES]
    commands += [f"set_super_value {field} @{epoch}" for field in ("mkfs_time", "wtime", "lastcheck")]
    run(["debugfs", "-w", "-f", "-", image], input="\n".join(commands) + "\n", env=_environment(epoch))


def _environment(epoch: int) -> dict[str, str]:
    # E2FSPROGS_FAKE_TIME is for versions before 1.47.1, which do not read SOURCE_DATE_EPOCH.
    return {
        **os.environ,
        "SOURCE_DATE_EPOCH": str(epoch),
        "E2FSPROGS_FAKE_TIME": str(epoch),
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
    }


def _as_root() -> list[str]:
    """Return the beginning of a command that runs the rest as root, or as root of a user namespace."""
    if os.geteuid() == 0:
        return []
    require("unshare", "newuidmap")
    return [str(shutil.which("unshare")), "--user", "--map-root-user", "--map-auto", "--"]
