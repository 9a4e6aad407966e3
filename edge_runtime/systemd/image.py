"""Checks that a service that is installed into an image will find there what it needs."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.protocol.errors import InputError

# The kernel's own limit of symbolic links in a path.
MAX_LINKS = 40
DEFAULT_CONFIG = Path("/etc/flexspec/config.toml")


def find_in_image(root: Path, path: Path) -> Path:
    """Return where the absolute `path` of an image is on this machine; its symbolic links lead inside the image.

    Raises:
        InputError: the links form a circle.
    """
    parts, done, links = list(path.parts[:0:-1]), root, 0
    while parts:
        part = parts.pop()
        step = done.parent if part == ".." and done != root else done if part == ".." else done / part
        if not step.is_symlink():
            done = step
            continue
        links += 1
        if links > MAX_LINKS:
            raise InputError(f"{path} in {root}: too many levels of symbolic links")
        target = step.readlink()
        if target.is_absolute():
            done = root
        parts += [name for name in reversed(target.parts) if name != "/"]
    return done


def choose_interpreter(root: Path, python: Path | None) -> Path:
    """Return the path, inside the image, of the interpreter that its service will run.

    Args:
        python: the one that was named; None takes the one in use if the image has it, too.

    Raises:
        InputError: the image has no such interpreter.
    """
    current = Path(sys.executable)
    if python is None and current.is_relative_to(root.resolve()):
        current = Path("/") / current.relative_to(root.resolve())
    chosen = python or current
    if not chosen.is_absolute():
        raise InputError(f"--python {chosen}: write its absolute path inside the image")
    found = find_in_image(root, chosen)
    if not (found.is_file() and os.access(found, os.X_OK)):
        raise InputError(
            f"there is no interpreter {chosen} in {root}: install FlexSpec there, in a virtual environment such as "
            "/opt/flexspec, and name its interpreter with --python"
        )
    return chosen


def check_files(root: Path, paths: list[Path]) -> None:
    """Raise InputError unless the image has all of these absolute paths."""
    for path in paths:
        if not os.path.lexists(find_in_image(root, path)):
            raise InputError(f"there is no {path} in {root}, and the service would not start; put it there first")


def missing_for_board(root: Path, config: Path | None, bundle: Path | None, state: str) -> Iterator[str]:
    """Yield what a board's service lacks in the image: a configuration or a bundle, one sentence each.

    Args:
        config, bundle: as its arguments name them; None for the defaults.
        state: its directory below /var/lib, which has the bundle store.

    Raises:
        InputError: the configuration is not TOML.
    """
    file = find_in_image(root, config or DEFAULT_CONFIG)
    document: dict[str, dict[str, object]] = {}
    if file.is_file():
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: {error}; correct it there") from None
    else:
        yield f"there is no {DEFAULT_CONFIG} in {root}: the service will look for a verifier on its own machine"
    named = document.get("draft", {}).get("bundle") if isinstance(document.get("draft"), dict) else None
    if bundle is None and isinstance(named, str):
        bundle = (config or DEFAULT_CONFIG).parent / named
    current = [Path("/var/lib", state, "bundles/current"), Path("/var/lib/private", state, "bundles/current")]
    if not any(find_in_image(root, path).is_dir() for path in ([bundle] if bundle else current)):
        where = bundle or current[0].parent
        yield (
            f"there is no draft bundle at {where} in {root}: the service will not start before one is installed; run "
            f"`edge-runtime bundle install FILE --store {root}{current[0].parent}`"
        )
