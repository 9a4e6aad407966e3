"""Writes a profile and its chart, atomically."""

from __future__ import annotations

from pathlib import Path

import msgspec

from device_profiles.calibrate.chart import ChartLine, line_chart
from edge_runtime.common.files import write_atomically
from edge_runtime.planning.board_profile import BoardProfile, ProfileError

# Anyone may read a profile, as far as the umask allows.
MODE = 0o666


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
        write_atomically(path.with_suffix(".svg"), chart.encode(), MODE)
        write_atomically(path, msgspec.toml.encode(profile), MODE)
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}") from None


def draft_chart(profile: BoardProfile, cache_bytes: int) -> str:
    """SVG chart of a measured profile: ms per token over context, per number of threads, measured and modeled."""
    first = profile.draft[0]
    curves = [
        ChartLine(f"{speed.threads} thread{'s' * (speed.threads > 1)}", sorted(speed.milliseconds.items()))
        for speed in profile.draft
    ]
    unmeasured = msgspec.structs.replace(profile, draft=[])
    modeled = [
        (x, 1e3 * unmeasured.draft_seconds(first.weight_bytes, x, cache_bytes)) for x in sorted(first.milliseconds)
    ]
    gigabytes = profile.processor.weight_bytes_per_second / 1e9
    return line_chart(
        f"{profile.title}: {first.bundle}, {first.weight_bytes / 1e6:.3g} MB of weights",
        "context, tokens",
        "ms per drafted token",
        [*curves, ChartLine(f"modeled, {gigabytes:.3g} GB/s", modeled, modeled=True)],
    )
