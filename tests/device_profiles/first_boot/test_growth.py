"""Growing the root partition of a card, which is a file here."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.first_boot.growth import extend_partition, free_bytes_after
from device_profiles.image.disk import ALIGNMENT, MIB, assemble, partition_offset
from tests.device_profiles.programs import require_programs


@pytest.mark.slow
def test_the_last_partition_is_extended_to_the_end_of_the_card(tmp_path: Path) -> None:
    require_programs("sfdisk")
    for name in ("boot", "root"):
        (tmp_path / name).write_bytes(bytes(8 * MIB))
    card = tmp_path / "card"
    assemble(card, tmp_path / "boot", tmp_path / "root", 1_760_000_000)
    before = card.read_bytes()[:440]
    with card.open("r+b") as file:
        file.truncate(100 * MIB)
    extend_partition(card, 2)
    assert partition_offset(card, 1) == (ALIGNMENT, 8 * MIB)
    start = ALIGNMENT + 8 * MIB
    assert partition_offset(card, 2) == (start, 100 * MIB - start)
    assert card.read_bytes()[:440] == before


def test_the_gain_is_what_comes_after_the_partition(tmp_path: Path) -> None:
    partition = tmp_path / "mmcblk0/mmcblk0p2"
    partition.mkdir(parents=True)
    for path, sectors in ((tmp_path / "mmcblk0/size", 1000), (partition / "start", 100), (partition / "size", 300)):
        path.write_text(f"{sectors}\n")
    assert free_bytes_after(partition) == 600 * 512
