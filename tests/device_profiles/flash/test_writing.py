"""Writing images to cards, which are files here, with the faults that cards and their readers have."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from device_profiles.flash import command
from device_profiles.flash.devices import BlockDevice
from device_profiles.flash.writing import CHUNK_BYTES, HEAD_BYTES, CardDevice, FlashError, open_image, write_image
from device_profiles.image.block_map import BlockMap, map_image, whole_image
from edge_runtime.protocol.errors import InputError
from tests.device_profiles.programs import require_programs

CARD_BYTES = 8 * CHUNK_BYTES
# What was on the card before.
OLD = 0xA5
# Offset and size of what the image uses: the start, something across the end of the head, an odd end.
SPANS = [(0, 4096), (HEAD_BYTES - 8192, 3 * 8192), (3 * CHUNK_BYTES, 2 * CHUNK_BYTES + 4096)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    content = bytearray(6 * CHUNK_BYTES)
    generator = random.Random(1)
    for offset, size in SPANS:
        content[offset : offset + size] = generator.randbytes(size)
    path = tmp_path / "disk.img"
    path.write_bytes(content)
    return path


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "card"
    path.write_bytes(bytes([OLD]) * CARD_BYTES)
    return path


def write(
    image: Path, block_map: BlockMap, card: CardDevice, progress: Callable[[str, int], None] | None = None
) -> None:
    try:
        with open_image(image) as source:
            write_image(source, block_map, card, progress or (lambda stage, done: None))
    finally:
        card.close()


def test_a_card_gets_the_mapped_blocks_and_keeps_the_rest(image: Path, card: Path) -> None:
    stages: list[tuple[str, int]] = []
    block_map = map_image(image, SPANS)
    write(image, block_map, CardDevice(card), lambda stage, done: stages.append((stage, done)))
    content, expected = card.read_bytes(), image.read_bytes()
    for offset, size, _ in block_map.spans():
        assert content[offset : offset + size] == expected[offset : offset + size]
    assert set(content[2 * CHUNK_BYTES : 3 * CHUNK_BYTES]) == {OLD}
    # The copy of a GPT at the end of the card is gone, so that no program repairs the old table.
    assert content[-CHUNK_BYTES:] == bytes(CHUNK_BYTES)
    assert stages[-1] == ("verify", block_map.mapped_bytes)


def test_without_a_map_all_blocks_are_written(image: Path, card: Path) -> None:
    write(image, whole_image(image.stat().st_size), CardDevice(card))
    assert card.read_bytes()[: image.stat().st_size] == image.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_compressed_images_are_the_same(image: Path, card: Path, suffix: str) -> None:
    packed = image.with_name(f"disk.img{suffix}")
    if suffix == ".zst":
        require_programs("zstd")
        subprocess.run(["zstd", "-q", image, "-o", packed], check=True)
    else:
        packed.write_bytes({".xz": lzma, ".gz": gzip}[suffix].compress(image.read_bytes()))  # type: ignore[attr-defined]
    write(packed, map_image(image, SPANS), CardDevice(card))
    head = card.read_bytes()[:4096]
    assert head == image.read_bytes()[:4096]


class FaultyCard(CardDevice):
    """A card with a fault: `short` writes, a removal after `writes_left`, or a wrong bit in the byte `flipped`."""

    def __init__(
        self, path: Path, *, short: bool = False, writes_left: int = 10**9, flipped: int | None = None
    ) -> None:
        super().__init__(path)
        self._short, self._writes_left, self._flipped = short, writes_left, flipped

    def write(self, data: bytes | memoryview, offset: int) -> int:
        if self._writes_left == 0:
            raise OSError(errno.ENODEV, "No such device")
        self._writes_left -= 1
        return super().write(data[: max(1, len(data) // 2)] if self._short else data, offset)

    def read(self, size: int, offset: int) -> bytes:
        data = bytearray(super().read(size, offset))
        if self._flipped is not None and offset <= self._flipped < offset + size:
            data[self._flipped - offset] ^= 1
        return bytes(data)


def does_not_boot(card: Path) -> bool:
    return card.read_bytes()[:HEAD_BYTES] == bytes(HEAD_BYTES)


def test_short_writes_are_continued(image: Path, card: Path) -> None:
    block_map = map_image(image, SPANS)
    write(image, block_map, FaultyCard(card, short=True))
    content, expected = card.read_bytes(), image.read_bytes()
    assert all(content[a : a + size] == expected[a : a + size] for a, size, _ in block_map.spans())


@pytest.mark.parametrize("flipped", [3 * CHUNK_BYTES + 17, HEAD_BYTES + 5])
def test_a_card_that_reads_back_something_else_does_not_boot(image: Path, card: Path, flipped: int) -> None:
    with pytest.raises(FlashError, match=r"does not hold what was written .*does not boot"):
        write(image, map_image(image, SPANS), FaultyCard(card, flipped=flipped))
    assert does_not_boot(card)


@pytest.mark.parametrize("writes", [0, 1, 2, 4])
def test_a_card_that_is_removed_does_not_boot(image: Path, card: Path, writes: int) -> None:
    with pytest.raises(FlashError, match=r"the card was removed.*does not boot"):
        write(image, map_image(image, SPANS), FaultyCard(card, writes_left=writes))
    assert does_not_boot(card) or writes == 0


def test_a_card_that_is_too_small_is_left_alone(image: Path, card: Path) -> None:
    with card.open("r+b") as file:
        file.truncate(5 * CHUNK_BYTES)
    with pytest.raises(InputError, match=r"use a larger card; nothing was written"):
        write(image, map_image(image, SPANS), CardDevice(card))
    assert set(card.read_bytes()) == {OLD}


@pytest.mark.parametrize("stage", ["write", "verify"])
def test_an_interruption_leaves_a_card_that_does_not_boot(image: Path, card: Path, stage: str) -> None:
    def interrupt(now: str, done: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(image, map_image(image, SPANS), CardDevice(card), interrupt)
    assert does_not_boot(card)


def test_a_damaged_image_is_found_before_the_card_boots(image: Path, card: Path) -> None:
    block_map = map_image(image, SPANS)
    with image.open("r+b") as file:
        file.seek(3 * CHUNK_BYTES)
        file.write(b"damage")
    with pytest.raises(FlashError, match=r"the image is damaged.*does not boot"):
        write(image, block_map, CardDevice(card))
    assert does_not_boot(card)


def test_a_truncated_image_is_found(image: Path, card: Path) -> None:
    block_map = map_image(image, SPANS)
    with pytest.raises(FlashError, match="ends too early"):
        write_image(io.BytesIO(image.read_bytes()[: 4 * CHUNK_BYTES]), block_map, CardDevice(card), lambda *_: None)
    assert does_not_boot(card)


def device(path: Path, **changes: object) -> BlockDevice:
    fields = {"bytes": CARD_BYTES, "model": "Reader", "removable": True, "read_only": False, "uses": [], **changes}
    return BlockDevice(path=path, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uses": ["/media/me/bootfs"]}, r"it is in use \(/media/me/bootfs\); unmount it first"),
        ({"uses": ["/", "/boot/efi"]}, "this machine runs from it"),
        ({"removable": False}, "it is not removable"),
        ({"bytes": 10**12}, "larger than a card"),
    ],
)
def test_disks_that_are_no_cards_are_refused_unless_told_twice(
    image: Path, card: Path, changes: dict[str, object], message: str
) -> None:
    options = command_options(image, card)
    for force in ([], ["--force"]):
        with pytest.raises(InputError, match=message):
            command._flash(
                command_options(image, card, *force), image, map_image(image, SPANS), device(card, **changes)
            )
    assert set(card.read_bytes()) == {OLD}
    options = command_options(image, card, "--force", "--force")
    command._flash(options, image, map_image(image, SPANS), device(card, **changes))
    assert card.read_bytes()[:4096] == image.read_bytes()[:4096]


@pytest.mark.parametrize(
    ("changes", "message"), [({"read_only": True}, "write-protected"), ({"bytes": 0}, "no card in")]
)
def test_cards_that_cannot_be_written_are_refused(
    image: Path, card: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        command._flash(command_options(image, card), image, map_image(image, SPANS), device(card, **changes))


def test_nothing_is_written_without_a_confirmation(image: Path, card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = command_options(image, card)
    options.yes = False
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    with pytest.raises(InputError, match="not confirmed"):
        command._flash(options, image, map_image(image, SPANS), device(card))
    assert set(card.read_bytes()) == {OLD}


def command_options(image: Path, card: Path, *more: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["flash", str(image), str(card), "--yes", *more])
