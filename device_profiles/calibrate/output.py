"""Writes a profile and its chart, atomically."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from device_profiles.calibrate.chart import ChartLine, line_chart
from edge_runtime.planning.board_profile import BoardProfile, ProfileError


def check_writable(path: Path, force: bool) -> None:
    """Raises ProfileError if `path` cannot be written, or exists and `force` is false."""
    if path.suffix != ".toml":
        raise ProfileError(f"{path} is not a .toml file: name it {path.name}.toml")
    if not path.parent.is_dir():
        raise ProfileError(f"there is no directory {path.parent} to write {path.name} to: make it first")
    for file in (path, path.with_suffix(".svg")):
        if file.exists() and not force:
            raise ProfileError(f"{file} exists: give --force to replace it, or another --output")


def save(path: Path, profile: BoardProfile, chart: str) -> None:
    """Write `profile` to `path` and `chart`, an SVG document, next to it. Raises ProfileError."""
    try:
        _replace(path.with_suffix(".svg"), chart.encode())
        _replace(path, msgspec.toml.encode(profile))
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}") from None


def draft_chart(profile: BoardProfile, cache_bytes: int) -> str:
    """SVG chart of a measured profile: ms per token over context, per number of threads, measured and modelled."""
    first = profile.draft[0]
    curves = [
        ChartLine(
            f"{speed.threads} thread{'s' * (speed.threads > 1)}", [(float(x), y) for x, y in sorted(times.items())]
        )
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
        [*curves, ChartLine(f"modelled, {gigabytes:.3g} GB/s", modelled, modelled=True)],
    )


def _replace(path: Path, contents: bytes) -> None:
    """Replace `path` atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
