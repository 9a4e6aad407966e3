"""What the options of `serve` grant: to how many, to whom, and whether there is memory for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.protocol.errors import InputError

# `serve` reads them before it loads what takes long.
if TYPE_CHECKING:
    from edge_runtime.protocol.bundle import Manifest
    from edge_runtime.service.state import ServiceLimits


def limits_of(options: argparse.Namespace) -> ServiceLimits:
    """The limits that the options name. Raises InputError."""
    from edge_runtime.service.state import ServiceLimits

    least = {"max_concurrent": 1, "max_waiting": 0, "max_new_tokens": 1, "max_body": 1, "threads": 0, "grace": 0}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {bound}")
    return ServiceLimits(options.max_concurrent, options.max_waiting, options.max_new_tokens, options.max_body)


def keys_of(options: argparse.Namespace) -> frozenset[str]:
    """The keys of those who are served; empty for everybody. Raises InputError."""
    return _read_keys(options.api_key_file) if options.api_key_file else frozenset()


def check_memory(manifest: Manifest, answers: int) -> None:
    """Raises InputError if the draft's keys and values of so many full contexts would not fit into memory now."""
    import psutil

    from edge_runtime.planning.board_profile import cache_bytes

    needed = answers * cache_bytes(manifest) * manifest.architecture.context
    available = psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"--max-concurrent {answers}: so many texts of {manifest.architecture.context} tokens take "
            f"{needed >> 20} MB in the draft, and {available >> 20} MB are available; lower it"
        )


def _read_keys(path: Path) -> frozenset[str]:
    """The keys in a file, one a line; empty lines and lines that begin with # are none. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the API keys in {path}: {error}") from None
    keys = frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path} has no API key: write one a line")
    return keys
