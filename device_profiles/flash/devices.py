"""The disks of this machine, from /sys and /proc: which of them are cards, and which are in use."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from edge_runtime.protocol.errors import InputError

SECTOR_BYTES = 512
# Not disks: RAM disks, files, mapped devices (which are on disks), optical drives.
NOT_DISKS = re.compile(r"(loop|ram|zram|dm-|md|sr|fd|nbd)\d*")
# Larger than cards that boards boot from, hence likely a disk with somebody's data. Chosen.
MAX_CARD_BYTES = 300_000_000_000
SYSTEM_MOUNTS = re.compile(r"/|/(boot|usr|var|home|etc|opt|srv)(/.*)?")


class BlockDevice(msgspec.Struct, frozen=True):
    """A disk.

    Attributes:
        path: such as /dev/sdb.
        bytes: its size; 0 if there is no medium in a reader.
        model: as it calls itself.
        removable: whether it is a card, or connected by USB.
        read_only: whether its write protection is on.
        uses: what this machine uses it for: where its partitions are mounted, `swap`, or the name of a mapped device.
    """

    path: Path
    bytes: int
    model: str
    removable: bool
    read_only: bool
    uses: list[str]

    @property
    def is_system_disk(self) -> bool:
        """Whether this machine runs from it."""
        return any(SYSTEM_MOUNTS.fullmatch(use) or use == "swap" for use in self.uses)

    def describe(self) -> str:
        """Return name, size and model for people."""
        return f"{self.path}, {self.bytes / 1e9:.1f} GB, {self.model or 'of unknown model'}"


def list_devices(sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> list[BlockDevice]:
    """Return all disks."""
    mounts = _mounts(proc)
    devices = []
    for entry in sorted((sysfs / "block").iterdir()) if (sysfs / "block").is_dir() else []:
        if NOT_DISKS.fullmatch(entry.name) or re.fullmatch(r"mmcblk\d+(boot\d+|rpmb)", entry.name):
            continue
        devices.append(_read_device(entry, mounts, _swaps(proc), sysfs))
    return devices


def find_device(path: Path, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> BlockDevice:
    """Return the disk at `path`. Raises InputError: it is none, or a partition of one."""
    devices = list_devices(sysfs, proc)
    name = path.resolve().name if path.is_symlink() else path.name
    for device in devices:
        if device.path.name == name:
            return device
    for device in devices:
        if name.startswith(device.path.name):
            raise InputError(f"{path} is a partition; an image is written to the whole disk, {device.path}")
    raise InputError(f"{path} is not a disk; `device-profile flash --list` shows the cards of this machine")


def refusals(device: BlockDevice, image_bytes: int) -> list[str]:
    """Return why a device should not be overwritten, a clause each, which a user may override."""
    reasons = []
    if device.is_system_disk:
        reasons.append(f"this machine runs from it ({', '.join(device.uses)})")
    elif device.uses:
        reasons.append(f"it is in use ({', '.join(device.uses)}); unmount it first")
    if not device.removable:
        reasons.append("it is not removable")
    if device.bytes > MAX_CARD_BYTES:
        reasons.append(f"with {device.bytes / 1e9:.0f} GB it is larger than a card")
    return reasons


def _read_device(entry: Path, mounts: dict[str, list[str]], swaps: set[str], sysfs: Path) -> BlockDevice:
    model = " ".join(text for name in ("vendor", "model", "name") if (text := _text(entry / "device" / name)))
    bus = {part[:3] for part in entry.resolve().parts}
    uses: list[str] = []
    for part in [entry, *sorted(path.parent for path in entry.glob("*/partition"))]:
        uses += mounts.get(_text(part / "dev"), [])
        uses += ["swap"] if f"/dev/{part.name}" in swaps else []
        for holder in sorted((part / "holders").glob("*")):
            # A mapped device, such as an encrypted or a logical volume.
            uses += [*mounts.get(_text(sysfs / "block" / holder.name / "dev"), []), holder.name]
    return BlockDevice(
        path=Path("/dev", entry.name),
        bytes=int(_text(entry / "size") or 0) * SECTOR_BYTES,
        model=model,
        removable=_text(entry / "removable") == "1" or "usb" in bus or _text(entry / "device/type") == "SD",
        read_only=_text(entry / "ro") == "1",
        uses=uses,
    )


def _mounts(proc: Path) -> dict[str, list[str]]:
    """Return the mount points by device number, such as 8:1."""
    mounts: dict[str, list[str]] = {}
    for line in _text(proc / "self/mountinfo").splitlines():
        words = line.split()
        # The kernel writes blanks in paths as \040.
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), words[4])
        if point not in mounts.setdefault(words[2], []):
            mounts[words[2]].append(point)
    return mounts


def _swaps(proc: Path) -> set[str]:
    return {line.split()[0] for line in _text(proc / "swaps").splitlines()[1:] if line}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
