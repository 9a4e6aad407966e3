"""Writing a profile and its picture: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from device_profiles.calibrate.chart import Curve, line_chart
from edge_runtime.planning.board_profile import Profile, ProfileError


def check_free(path: Path, force: bool) -> None:
    """Raises ProfileError where `path` cannot be written, or would be overwritten without `force`."""
    if path.suffix != ".toml":
        raise ProfileError(f"a profile is a .toml file, and {path} is none: name it {path.name}.toml")
    if not path.parent.is_dir():
        raise ProfileError(f"there is no directory {path.parent} to write {path.name} to: make it first")
    for file in (path, path.with_suffix(".svg")):
        if file.exists() and not force:
            raise ProfileError(f"{file} exists: give --force to replace it, or another --output")


def save(path: Path, profile: Profile, picture: str) -> None:
    """Writes `profile` to `path` and `picture` beside it as .svg. Raises ProfileError."""
    try:
        _replace(path.with_suffix(".svg"), picture.encode())
        _replace(path, msgspec.toml.encode(profile))
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}") from None


def draft_chart(profile: Profile, cache_bytes: int) -> str:
    """The picture of a measured profile: ms per token by context, for each number of threads, and what is modelled."""
    first = profile.draft[0]
    curves = [
        Curve(f"{speed.threads} thread{'s' * (speed.threads > 1)}", [(float(x), y) for x, y in sorted(times.items())])
        for speed in profile.draft
        for times in [speed.milliseconds]
    ]
    unmeasured = msgspec.structs.replace(profile, draft=[])
    modelled = [
        (float(x), 1e3 * unmeasured.draft_seconds(first.weight_bytes, x, cache_bytes=cache_bytes))
        for x in sorted(first.milliseconds)
    ]
    gigabytes = profile.processor.weight_bytes_per_second / 1e9
    return line_chart(
        f"{profile.title}: {first.bundle}, {first.weight_bytes / 1e6:.3g} MB of weights",
        "context, tokens",
        "ms per drafted token",
        [*curves, Curve(f"modelled, {gigabytes:.3g} GB/s", modelled, modelled=True)],
    )


def _replace(path: Path, contents: bytes) -> None:
    """Puts `contents` at `path` in one step: who reads meanwhile, or interrupts, finds the old file or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
