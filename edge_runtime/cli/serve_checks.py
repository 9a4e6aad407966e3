"""What `edge-runtime serve` checks before it loads anything: settings, options, secrets, the client, and the bundle.

`config check` and `service install` run these same checks, so that they refuse what `serve` would refuse.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.cli.draft_options import resolve_bundle
from edge_runtime.cli.planner_options import parse_fixed_plan
from edge_runtime.cli.settings_options import read_settings
from edge_runtime.cli.verifier_client import make_client
from edge_runtime.common.network import is_loopback
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import ServiceSettings, Settings, check_verifier_settings, read_api_keys

# `serve` checks its options before it loads what takes long.
if TYPE_CHECKING:
    from edge_runtime.protocol.bundle import Manifest
    from edge_runtime.service.auth import AccessRules
    from edge_runtime.service.state import ServiceLimits
    from edge_runtime.verifier import VerifierClient


class ServeSetup(NamedTuple):
    """The checked configuration and options of `serve`, and what was made from them.

    Attributes:
        client: has no connection yet; whoever uses it closes it.
        bundle: directory of the draft bundle; it exists and fits into memory. None if none is installed.
    """

    settings: Settings
    limits: ServiceLimits
    keys: frozenset[str]
    client: VerifierClient
    bundle: Path | None


def check_serve(options: argparse.Namespace, settings: Settings) -> ServeSetup:
    """Check the options of `serve` and the settings that result from them and the configuration.

    Raises:
        InputError: `serve` would refuse them.
        BundleError: the configured bundle cannot be used.
    """
    limits, keys = check_limits(options, settings)
    client = make_client(settings.verifier)
    installed = settings.draft.bundle or os.path.lexists(settings.draft.store / "current")
    bundle = resolve_bundle(options, settings.draft)
    if installed or bundle.exists():
        from edge_runtime.protocol.bundle import read_bundle

        manifest = read_bundle(bundle, verify=False).manifest
        check_memory(manifest, settings.service.max_concurrent, settings.draft.prefix_cache_mib)
    return ServeSetup(settings, limits, keys, client, bundle if installed or bundle.exists() else None)


def check_installed(options: argparse.Namespace) -> None:
    """Check options of `serve` and the configuration as a service would find them. Raises InputError."""
    settings = read_settings(options, {})
    check_limits(options, settings)
    make_client(settings.verifier)


def check_limits(options: argparse.Namespace, settings: Settings) -> tuple[ServiceLimits, frozenset[str]]:
    """Check what a reload may change. Returns the limits and the API keys. Raises InputError."""
    limits, file = make_limits(options, settings), settings.service.api_key_file
    keys = read_api_keys(file) if file else frozenset()
    check_verifier_settings(settings.verifier)
    parse_fixed_plan(options, settings.planner)
    if bool(options.certificate) != bool(options.key):
        raise InputError("--certificate and --key go together")
    return limits, keys


def make_limits(options: argparse.Namespace, settings: Settings) -> ServiceLimits:
    """Create the limits of the service."""
    from edge_runtime.service.state import ServiceLimits

    service = settings.service
    return ServiceLimits(service.max_concurrent, service.max_waiting, options.max_new_tokens, options.max_body)


def make_access(service: ServiceSettings, keys: frozenset[str]) -> AccessRules:
    """Return who may use the service."""
    from edge_runtime.service.auth import AccessRules

    return AccessRules(keys, is_loopback(service.host), tuple(service.allowed_hosts), tuple(service.cors_origins))


def check_memory(manifest: Manifest, answers: int, prefix_cache_mib: int = 0) -> None:
    """Raise InputError if the draft's KV caches exceed the memory available now.

    Args:
        answers: number of full contexts.
        prefix_cache_mib: what the caches of ended texts take in addition.
    """
    import psutil

    from edge_runtime.planning.board_profile import cache_bytes

    context = manifest.architecture.context
    needed = answers * cache_bytes(manifest) * context + (prefix_cache_mib << 20)
    available = psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"--max-concurrent {answers}, --draft-prefix-cache {prefix_cache_mib}: the draft's KV caches for {answers} "
            f"contexts of {context} tokens and for ended texts take {needed >> 20} MB, and {available >> 20} MB are "
            "available; lower them"
        )
