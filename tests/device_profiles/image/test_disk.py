"""File systems, partition table and block map of an image, made without root and without mounts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from device_profiles.flash.writing import CardDevice, write_image
from device_profiles.image.block_map import read_block_map, write_block_map
from device_profiles.image.boot_partition import ImagePartition
from device_profiles.image.disk import ALIGNMENT, BOOT_LABEL, ROOT_LABEL, partition_offset
from device_profiles.image.programs import run, search_path
from edge_runtime.protocol.errors import InputError
from tests.device_profiles.image.small_image import BOOT_BYTES, EPOCH, build_small_image
from tests.device_profiles.programs import require_programs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small image, with its block map."""
    directory = tmp_path_factory.mktemp("image")
    image, block_map = build_small_image(directory)
    image.with_name("disk.img.bmap").write_text(write_block_map(block_map))
    return directory


def debugfs(image: Path, request: str) -> str:
    return run(["debugfs", "-R", request, image]).stdout


@pytest.mark.slow
def test_the_same_inputs_make_the_same_image(built: Path, tmp_path: Path) -> None:
    image, block_map = build_small_image(tmp_path)
    assert image.read_bytes() == (built / "disk.img").read_bytes()
    assert block_map == read_block_map(built / "disk.img.bmap")


def test_the_root_file_system_has_owners_modes_and_times_of_the_archives(built: Path) -> None:
    root = built / "root.img"
    assert debugfs(root, "cat /etc/hostname") == "flexspec\n"
    assert "Mode:  0640" in debugfs(root, "stat /etc/shadow")
    # A link of the first archive to a directory stays one when a later archive has files there.
    assert 'Fast link dest: "usr/lib"' in debugfs(root, "stat /lib")
    assert "Size: 76800" in debugfs(root, "stat /usr/lib/module")
    times = [line for line in debugfs(root, "stat /etc/shadow").splitlines() if "time:" in line]
    assert len(times) == 4
    assert all(f"0x{EPOCH:08x}" in line for line in times)


def test_file_systems_have_labels_and_no_errors(built: Path) -> None:
    require_programs("fsck.vfat", "e2fsck")
    assert run(["e2fsck", "-fn", built / "root.img"]).stdout.splitlines()[-1].startswith(ROOT_LABEL)
    run(["fsck.vfat", "-n", built / "boot.img"])
    assert BOOT_LABEL in run(["mdir", "-i", built / "boot.img", "::"]).stdout


def test_the_partition_table_names_both_file_systems(built: Path) -> None:
    image = built / "disk.img"
    assert partition_offset(image) == (ALIGNMENT, BOOT_BYTES)
    assert partition_offset(image, 2) == (ALIGNMENT + BOOT_BYTES, (built / "root.img").stat().st_size)
    assert partition_offset(image, 3) == (0, 0)
    assert ImagePartition(image).read("config.txt") == b"arm_64bit=1\n"
    assert ImagePartition(image).read("flexspec.toml") is None


@pytest.mark.slow
def test_a_used_card_with_only_the_mapped_blocks_has_no_errors(built: Path, tmp_path: Path) -> None:
    """Zeros that belong to a file system are written; free space keeps what the card had."""
    require_programs("fsck.vfat", "e2fsck")
    image, block_map = built / "disk.img", read_block_map(built / "disk.img.bmap")
    size = image.stat().st_size
    assert block_map.mapped_bytes < 0.6 * size
    card = tmp_path / "card"
    card.write_bytes(b"\xff" * size)
    device = CardDevice(card)
    with image.open("rb") as source:
        write_image(source, block_map, device, lambda stage, done: None)
    device.close()
    for name, number, check in (("boot", 1, ["fsck.vfat", "-n"]), ("root", 2, ["e2fsck", "-fn"])):
        offset, length = partition_offset(card, number)
        part = tmp_path / name
        part.write_bytes(card.read_bytes()[offset : offset + length])
        run([*check, part])
    assert debugfs(tmp_path / "root", "cat /usr/zeros") == "\0" * 300_000


@pytest.mark.slow
def test_bmaptool_accepts_the_block_map(built: Path, tmp_path: Path) -> None:
    require_programs("bmaptool")
    copy = tmp_path / "copy.img"
    done = subprocess.run(
        ["bmaptool", "copy", "--bmap", built / "disk.img.bmap", built / "disk.img", copy],
        capture_output=True,
        text=True,
        env={"PATH": search_path()},
    )
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == (built / "disk.img").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [("<ImageSize>", "<ImageSiz>"), ("sha256", "sha257"), ("</bmap>", ""), ('chksum="', 'chksum="x')],
)
def test_a_damaged_block_map_is_refused(built: Path, tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "damaged.bmap"
    path.write_text((built / "disk.img.bmap").read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=r"damaged\.bmap"):
        read_block_map(path)
