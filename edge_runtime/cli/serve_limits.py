"""Limits and API keys of `edge-runtime serve`, and the check that the draft contexts fit into memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import Settings

# `serve` checks its options before it loads what takes long.
if TYPE_CHECKING:
    from edge_runtime.protocol.bundle import Manifest
    from edge_runtime.service.state import ServiceLimits


def make_limits(options: argparse.Namespace, settings: Settings) -> ServiceLimits:
    """Create the limits of the service. Raises InputError."""
    from edge_runtime.service.state import ServiceLimits

    service = settings.service
    for flag, value, minimum in (
        ("--max-concurrent", service.max_concurrent, 1),
        ("--max-waiting", service.max_waiting, 0),
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--max-body", options.max_body, 1),
        ("--threads", settings.draft.threads, 0),
        ("--grace", options.grace, 0),
    ):
        if value < minimum:
            raise InputError(f"{flag} {value}: must be at least {minimum}")
    return ServiceLimits(service.max_concurrent, service.max_waiting, options.max_new_tokens, options.max_body)


def read_api_keys(path: Path | None) -> frozenset[str]:
    """Read API keys, one per line; blank lines and lines that begin with # are skipped. None yields no keys.

    Raises:
        InputError: the file cannot be read or has no key.
    """
    if path is None:
        return frozenset()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the API keys in {path}: {error}") from None
    keys = frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path} has no API key: write one per line")
    return keys


def check_memory(manifest: Manifest, answers: int) -> None:
    """Raise InputError if the draft's KV cache for this many full contexts exceeds the memory available now."""
    import psutil

    from edge_runtime.planning.board_profile import cache_bytes

    context = manifest.architecture.context
    needed = answers * cache_bytes(manifest) * context
    available = psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"--max-concurrent {answers}: the draft's KV cache for {answers} contexts of {context} tokens takes "
            f"{needed >> 20} MB, and {available >> 20} MB are available; lower it"
        )
