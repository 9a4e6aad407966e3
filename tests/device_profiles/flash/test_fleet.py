"""A card for each line of a CSV file, each with its own flexspec.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from device_profiles.flash.fleet import personalise, read_fleet
from device_profiles.flash.writing import CardDevice, write_image
from device_profiles.image.boot_partition import ImagePartition
from device_profiles.image.disk import partition_offset
from device_profiles.image.programs import run
from edge_runtime.protocol.errors import InputError
from tests.device_profiles.image.small_image import build_small_image
from tests.device_profiles.programs import require_programs

COMMON = """\
# All boards of the house.
[wifi]
ssid = "home"
password = "correct horse"
country = "DE"
"""
BOARDS = """\
hostname,verifier_token,verifier.urls,service.port,note
kitchen,token-1,https://one.example,8401,left shelf
garage,token-2,"https://one.example,https://two.example",,
"""


def fleet(tmp_path: Path, text: str, common: str = COMMON) -> list[dict[str, object]]:
    path = tmp_path / "boards.csv"
    path.write_text(text)
    return [
        {"name": board.name, "note": board.note, **tomllib.loads(board.configuration)}
        for board in read_fleet(path, common, tmp_path)
    ]


def test_every_board_gets_its_own_values_and_the_common_ones(tmp_path: Path) -> None:
    kitchen, garage = fleet(tmp_path, BOARDS)
    assert kitchen == {
        "name": "kitchen",
        "note": "left shelf",
        "wifi": {"ssid": "home", "password": "correct horse", "country": "DE"},
        "board": {"hostname": "kitchen"},
        "secrets": {"verifier_token": "token-1"},
        "verifier": {"urls": ["https://one.example"]},
        "service": {"port": 8401},
    }
    assert garage["verifier"] == {"urls": ["https://one.example", "https://two.example"]}
    assert "service" not in garage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hostname,tokn\na,b\n", r"boards\.csv:2: there is no setting for the column 'tokn'"),
        ("hostname\nkitchen\nkitchen\n", r"boards\.csv:3: there is another board of the name kitchen"),
        ("hostname\nKitchen one\n", r"boards\.csv:2: .*'Kitchen one' is not a host name"),
        ("hostname,api_key\nkitchen\n", r"boards\.csv:2: has another number of columns"),
        ("hostname,verifier.urls\nkitchen,verifier\n", r"boards\.csv:2: .*'verifier' is not a URL"),
        ("hostname\n", "has no boards"),
    ],
)
def test_a_mistake_is_found_before_the_first_card(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fleet(tmp_path, text)


@pytest.mark.slow
def test_a_personal_image_differs_in_its_boot_partition_only(tmp_path: Path) -> None:
    require_programs("fsck.vfat")
    image, block_map = build_small_image(tmp_path)
    personal = tmp_path / "personal.img"
    own_map = personalise(image, block_map, COMMON, personal)
    card = tmp_path / "card"
    card.write_bytes(b"\xff" * image.stat().st_size)
    device = CardDevice(card)
    with personal.open("rb") as source:
        write_image(source, own_map, device, lambda stage, done: None)
    device.close()
    assert ImagePartition(card).read("flexspec.toml") == COMMON.encode()
    offset, size = partition_offset(card)
    (tmp_path / "boot-of-card").write_bytes(card.read_bytes()[offset : offset + size])
    run(["fsck.vfat", "-n", tmp_path / "boot-of-card"])
    end = offset + size
    for start, length, _ in block_map.spans():
        if start >= end:
            assert card.read_bytes()[start : start + length] == image.read_bytes()[start : start + length]
