"""The FAT boot partition of a card: mounted somewhere, or in an image, where mtools changes it without a mount."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from device_profiles.image.disk import partition_offset
from device_profiles.image.programs import ImageError, require, run, run_binary
from edge_runtime.protocol.errors import InputError

# Files that the boot partition of a Raspberry Pi has, one of them at least.
RASPBERRY_PI_FILES = ("config.txt", "cmdline.txt")


class BootPartition(Protocol):
    """Files of a boot partition, by their path in it."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file, or copy one; its directory is created."""


class MountedPartition:
    """A boot partition that is mounted at a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> bytes | None:
        path = self._directory / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes | Path) -> None:
        data = content.read_bytes() if isinstance(content, Path) else content
        path = self._directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ImageError(f"cannot write {path}: {error.strerror}") from None


class ImagePartition:
    """The first partition of an image file."""

    def __init__(self, image: Path) -> None:
        """Raises InputError: the image has no partition table."""
        require("mcopy")
        offset, _ = partition_offset(image)
        if not offset:
            raise InputError(f"{image} has no partition table: is it compressed? decompress it first, with `xz -dk`")
        self._drive = f"{image}@@{offset}"

    def read(self, name: str) -> bytes | None:
        if not self._has(name):
            return None
        return run_binary(["mcopy", "-n", "-i", self._drive, f"::{name}", "-"]).stdout

    def write(self, name: str, content: bytes | Path) -> None:
        parent = str(Path(name).parent)
        if parent != "." and not self._has(f"{parent}/"):
            run(["mmd", "-i", self._drive, f"::{parent}"])
        options = ["-o", "-Q", "-i", self._drive]
        if isinstance(content, Path):
            run(["mcopy", *options, content, f"::{name}"])
        else:
            run_binary(["mcopy", *options, "-", f"::{name}"], input=content)

    def _has(self, name: str) -> bool:
        """Return whether there is this file, or this directory if the name ends with a slash. FAT ignores case."""
        listing = run(["mdir", "-b", "-/", "-a", "-i", self._drive, "::"]).stdout.splitlines()
        return f"::/{name}".lower() in {line.lower() for line in listing}


def open_boot_partition(place: Path) -> BootPartition:
    """Return the boot partition of an image file, or the one mounted at a directory. Raises InputError."""
    if not place.is_dir():
        if not place.is_file():
            raise InputError(f"there is no {place}; name an image file, or where a boot partition is mounted")
        return ImagePartition(place)
    partition = MountedPartition(place)
    if all(partition.read(name) is None for name in RASPBERRY_PI_FILES):
        raise InputError(f"{place} is not the boot partition of a Raspberry Pi: it has no config.txt")
    return partition
