"""Which disks a machine has, and which of them are in use, from a tree of /sys and /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.flash.devices import BlockDevice, find_device, list_devices, refusals
from edge_runtime.protocol.errors import InputError

MOUNTS = """\
22 1 253:0 / / rw,noatime shared:1 - ext4 /dev/mapper/root rw
25 22 259:1 / /boot/efi rw shared:2 - vfat /dev/nvme0n1p1 rw
60 22 8:17 / /media/me/my\\040card rw shared:9 - vfat /dev/sdb1 rw
"""
SWAPS = "Filename\tType\tSize\tUsed\tPriority\n/dev/nvme0n1p3 partition 1 0 -2\n"


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    sysfs, proc = tmp_path / "sys", tmp_path / "proc"
    (sysfs / "block").mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(MOUNTS)
    (proc / "swaps").write_text(SWAPS)
    disk(
        sysfs,
        "pci0/nvme",
        "nvme0n1",
        "259:0",
        500_107_862_016,
        {"model": "Samsung SSD 980"},
        {"p1": "259:1", "p2": "259:2", "p3": "259:3"},
    )
    (sysfs / "block/nvme0n1/nvme0n1p2/holders/dm-0").mkdir(parents=True)
    disk(sysfs, "virtual", "dm-0", "253:0", 400_000_000_000, {}, {})
    disk(
        sysfs,
        "pci0/usb1/1-2/host6",
        "sdb",
        "8:16",
        31_914_983_424,
        {"vendor": "Generic", "model": "USB3.0 CRW   -SD"},
        {"1": "8:17"},
    )
    disk(sysfs, "pci0/usb1/1-2/host6", "sdc", "8:32", 0, {"vendor": "Generic", "model": "USB3.0 CRW -MS"}, {})
    disk(sysfs, "soc/mmc0", "mmcblk0", "179:0", 63_864_569_856, {"name": "SN64G", "type": "SD"}, {"p1": "179:1"})
    disk(sysfs, "virtual", "loop0", "7:0", 4096, {}, {})
    return sysfs, proc


def disk(
    sysfs: Path, bus: str, name: str, number: str, size: int, about: dict[str, str], partitions: dict[str, str]
) -> None:
    place = sysfs / "devices" / bus / name
    (place / "device").mkdir(parents=True)
    (sysfs / "block" / name).symlink_to(place)
    files = {"dev": number, "size": str(size // 512), "removable": "0", "ro": "0"}
    files |= {f"device/{key}": value for key, value in about.items()}
    for suffix, part in partitions.items():
        (place / f"{name}{suffix}").mkdir()
        files |= {f"{name}{suffix}/partition": suffix.lstrip("p"), f"{name}{suffix}/dev": part}
    for file, text in files.items():
        (place / file).write_text(f"{text}\n")


def devices(machine: tuple[Path, Path]) -> dict[str, BlockDevice]:
    return {device.path.name: device for device in list_devices(*machine)}


def test_disks_are_found_with_size_and_model(machine: tuple[Path, Path]) -> None:
    found = devices(machine)
    assert sorted(found) == ["mmcblk0", "nvme0n1", "sdb", "sdc"]
    assert found["sdb"].describe() == "/dev/sdb, 31.9 GB, Generic USB3.0 CRW   -SD"
    assert {name for name, device in found.items() if device.removable} == {"mmcblk0", "sdb", "sdc"}
    assert found["sdc"].bytes == 0


def test_what_a_disk_is_used_for_is_found_through_mapped_devices(machine: tuple[Path, Path]) -> None:
    found = devices(machine)
    assert found["nvme0n1"].uses == ["/boot/efi", "/", "dm-0", "swap"]
    assert found["nvme0n1"].is_system_disk
    assert found["sdb"].uses == ["/media/me/my card"]
    assert not found["sdb"].is_system_disk
    assert found["mmcblk0"].uses == []


def test_only_free_cards_are_accepted(machine: tuple[Path, Path]) -> None:
    reasons = {name: len(refusals(device, 0)) for name, device in devices(machine).items()}
    assert reasons == {"mmcblk0": 0, "nvme0n1": 3, "sdb": 1, "sdc": 0}


def test_partitions_and_other_files_are_no_disks(machine: tuple[Path, Path]) -> None:
    assert find_device(Path("/dev/sdb"), *machine).path == Path("/dev/sdb")
    with pytest.raises(InputError, match="is a partition; an image is written to the whole disk, /dev/mmcblk0"):
        find_device(Path("/dev/mmcblk0p1"), *machine)
    with pytest.raises(InputError, match="is not a disk"):
        find_device(Path("/dev/null"), *machine)
