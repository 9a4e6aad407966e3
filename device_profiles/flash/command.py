"""`device-profile flash`: write an image to a card."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.common.options import add_flag
from edge_runtime.common.terminal import new_console, print_note
from edge_runtime.protocol.errors import InputError

if TYPE_CHECKING:
    from device_profiles.flash.devices import BlockDevice
    from device_profiles.flash.writing import Progress
    from device_profiles.image.block_map import BlockMap

DESCRIPTION = """\
Writes an image to a card, reads all of it back and compares. With the block map IMAGE.bmap beside the image, free space
is not written. The partition table is written last: a card whose writing was interrupted does not boot.

A disk that is mounted, that is not removable, that is larger than a card, or that this machine runs from is refused,
unless --force is given twice. Without --yes, the name of the disk is asked for before it is overwritten.

With --config, the card gets this flexspec.toml, and with --fleet, one card after the other gets its own: the columns of
the CSV file are hostname, verifier_token, api_key, ssid, password, or any setting such as verifier.urls.

examples:
  device-profile flash --list
  device-profile flash flexspec-rpi5.img.xz /dev/sdb
  device-profile flash flexspec-rpi5.img /dev/sdb --config kitchen.toml
  device-profile flash flexspec-rpi5.img /dev/sdb --config common.toml --fleet boards.csv
"""


def add_parser(commands: Any) -> None:
    """Add `flash` to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "flash",
        help="write an image to a card, and verify it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "image", nargs="?", type=Path, metavar="IMAGE", help="image, compressed (.xz, .gz, .zst) or not"
    )
    parser.add_argument("device", nargs="?", type=Path, metavar="DEVICE", help="the card, such as /dev/sdb")
    add_flag(parser, "--list", "list the cards and disks of this machine")
    parser.add_argument("--config", type=Path, metavar="FILE", help="put this flexspec.toml on the card")
    parser.add_argument("--fleet", type=Path, metavar="CSV", help="write a card for each line of this file")
    parser.add_argument("--bmap", type=Path, metavar="FILE", help="block map (default: IMAGE.bmap, if there is one)")
    add_flag(parser, "--no-bmap", "write all blocks")
    add_flag(parser, "--yes", "do not ask before a card is overwritten")
    parser.add_argument(
        "--force", action="count", default=0, help="twice: overwrite a disk that is in use or does not look like a card"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code."""
    from device_profiles.flash.devices import find_device, list_devices

    if options.list:
        _print_devices(list_devices())
        return 0
    if options.image is None or options.device is None:
        raise InputError("name an image and a disk; `device-profile flash --list` shows the cards of this machine")
    if options.fleet and options.yes:
        raise InputError("--fleet waits for you to change cards: omit --yes")
    block_map = _block_map(options)
    with tempfile.TemporaryDirectory(prefix="flexspec-flash-", dir=options.image.parent) as scratch:
        if not options.config and not options.fleet:
            _flash(options, options.image, block_map, find_device(options.device))
            return 0
        image = _decompress(options.image, Path(scratch))
        for name, configuration, note in _boards(options, Path(scratch)):
            from device_profiles.flash.fleet import personalise

            if options.fleet:
                input(f"insert the card of {name}{f' ({note})' if note else ''}, and press Enter: ")
            personal = Path(scratch, "personal.img")
            own_map = personalise(image, block_map, configuration, personal)
            _flash(options, personal, own_map, find_device(options.device))
    return 0


def _flash(options: argparse.Namespace, image: Path, block_map: BlockMap, device: BlockDevice) -> None:
    from device_profiles.flash.devices import refusals
    from device_profiles.flash.writing import UNBOOTABLE, CardDevice, FlashError, open_image, write_image

    if device.read_only:
        raise InputError(f"{device.path} is write-protected: move the switch of the card")
    if not device.bytes:
        raise InputError(f"there is no card in {device.path}")
    reasons = refusals(device, block_map.image_bytes)
    if reasons and options.force < 2:
        again = "; --force once more overwrites it all the same" if options.force else ""
        raise InputError(f"refusing to overwrite {device.describe()}: {'; '.join(reasons)}{again}")
    if not options.yes:
        answer = input(f"everything on {device.describe()} will be lost. Type {device.path} to go on: ")
        if answer.strip() != str(device.path):
            raise InputError("not confirmed; nothing was written")
    card = CardDevice(device.path, exclusive=options.force < 2)
    try:
        with open_image(image) as source, _progress(block_map.mapped_bytes) as progress:
            write_image(source, block_map, card, progress)
    except KeyboardInterrupt:
        raise FlashError(f"interrupted while {device.path} was being written; {UNBOOTABLE}") from None
    finally:
        card.close()
    print(f"{device.path}: written and verified; the card can be removed")


def _boards(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, flexspec.toml and note of every card."""
    from device_profiles.first_boot.board_file import read_board_file
    from device_profiles.flash.fleet import read_fleet

    common = ""
    if options.config:
        if not options.fleet:
            read_board_file(options.config)
        common = options.config.read_text(encoding="utf-8-sig")
    if options.fleet:
        yield from read_fleet(options.fleet, common, scratch)
    else:
        yield options.config.name, common, ""


def _block_map(options: argparse.Namespace) -> BlockMap:
    from device_profiles.image.block_map import read_block_map, whole_image

    image: Path = options.image
    if not image.is_file():
        raise InputError(f"there is no image {image}")
    stem = image.with_suffix("") if image.suffix in (".xz", ".gz", ".zst") else image
    candidates = [options.bmap] if options.bmap else [stem.with_name(f"{stem.name}.bmap"), stem.with_suffix(".bmap")]
    if not options.no_bmap:
        for path in candidates:
            if options.bmap or path.is_file():
                return read_block_map(path)
    if stem != image:
        raise InputError(f"{candidates[0]} is missing: without it, decompress the image first")
    return whole_image(image.stat().st_size)


def _decompress(image: Path, scratch: Path) -> Path:
    """Return the image itself, or a decompressed copy of it."""
    from device_profiles.flash.writing import CHUNK_BYTES, open_image

    if image.suffix not in (".xz", ".gz", ".zst"):
        return image
    copy = scratch / "plain.img"
    with open_image(image) as source, copy.open("wb") as target:
        position = 0
        while chunk := source.read(CHUNK_BYTES):
            if chunk.strip(b"\0"):
                os.pwrite(target.fileno(), chunk, position)
            position += len(chunk)
        target.truncate(position)
    return copy


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """Show stage, rate and time left, on a terminal only."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = new_console(stderr=True)
    columns = (TextColumn("{task.description:7}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        tasks = {stage: bar.add_task(stage, total=total, start=False) for stage in ("write", "verify")}

        def advance(stage: str, done: int) -> None:
            bar.start_task(tasks[stage])
            bar.update(tasks[stage], completed=done)

        yield advance


def _print_devices(devices: list[BlockDevice]) -> None:
    for device in devices:
        if device.bytes:
            kind = "removable" if device.removable else "fixed"
            uses = f"in use: {', '.join(device.uses)}" if device.uses else ""
            print(f"{device.path!s:16} {device.bytes / 1e9:8.1f} GB  {kind:9}  {device.model:32} {uses}".rstrip())
    if not any(device.removable and device.bytes for device in devices):
        print_note("device-profile: there is no card: insert one, and wait until it is found")
