"""Grows the root partition and its file system to the end of the card, while they are in use."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SYSFS = Path("/sys/class/block")
SECTOR_BYTES = 512
# Less than this behind the root partition is not worth a change of the partition table. Chosen.
MIN_GAIN_BYTES = 64 << 20


def grow_root() -> str:
    """Grow the root file system. Returns what was done; empty if nothing.

    Raises:
        OSError, subprocess.CalledProcessError: a program is missing or failed; the file system is as it was.
    """
    device = Path(_output("findmnt", "--noheadings", "--output=SOURCE", "/"))
    place = (SYSFS / device.name).resolve()
    if not (place / "partition").exists():
        return ""
    disk, number = Path("/dev", place.parent.name), int((place / "partition").read_text())
    gain = free_bytes_after(place)
    if gain < MIN_GAIN_BYTES:
        return ""
    extend_partition(disk, number)
    # The kernel does not read the partition table of a disk in use again by itself.
    _output("partx", "--update", "--nr", str(number), str(disk))
    _output("resize2fs", str(device))
    return f"root file system grown by {gain / 1e9:.1f} GB"


def free_bytes_after(partition: Path) -> int:
    """Return how much of its disk comes after a partition, given as its directory in sysfs."""
    start, size = (int((partition / name).read_text()) for name in ("start", "size"))
    return (int((partition.parent / "size").read_text()) - start - size) * SECTOR_BYTES


def extend_partition(disk: Path, number: int) -> None:
    """Extend a partition to the end of `disk`, a device or an image. Raises subprocess.CalledProcessError."""
    command = ["sfdisk", "--quiet", "--force", "--no-reread", "--no-tell-kernel", "-N", str(number), str(disk)]
    subprocess.run(command, input=", +\n", text=True, check=True, capture_output=True)


def _output(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True, check=True, capture_output=True)
    return re.sub(r"\[.*\]$", "", done.stdout.strip())
