"""Options of the draft model and its n-gram cache, and what they stand for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.settings_options import add_settings
from edge_runtime.settings import DraftSettings

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.ngram_cache import NgramCache
    from edge_runtime.protocol.bundle import Manifest

# Part of a source checkout only, not of an installed package.
EXAMPLE_FAMILY = Path(__file__).resolve().parents[2] / "export" / "example_family"
# Below systemd's $STATE_DIRECTORY. The name is older than the term n-gram cache; existing boards have data there.
NGRAM_CACHE_DIRECTORY_NAME = "memory"


def add_ngram_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_ngram_cache` reads."""
    group = parser.add_argument_group("n-gram cache")
    add_settings(group, "draft.ngram_cache_directory", "draft.ngram_cache")


def resolve_bundle(options: argparse.Namespace, draft: DraftSettings) -> Path:
    """Return the bundle to load: of the command line, else of the configuration or its store, else the shipped one.

    Raises:
        BundleError: the bundle of the configuration or its store cannot be used.
        InputError: the configured public key cannot be read.
    """
    if "draft.bundle" not in vars(options) and (draft.bundle or os.path.lexists(draft.store / "current")):
        from edge_runtime.bundles.store import configured_bundle

        return configured_bundle(draft).path
    return draft.bundle or EXAMPLE_FAMILY / "bundle"


def load_draft(bundle: Path, draft: DraftSettings) -> OnnxDraft:
    """Load the draft model of `bundle` with these settings. Raises BundleError and DraftError."""
    from edge_runtime.draft import OnnxDraft

    return OnnxDraft.load(bundle, threads=draft.threads, prefix_cache_bytes=draft.prefix_cache_mib << 20)


def ngram_cache_state_directory() -> Path | None:
    """Return where a systemd service keeps its n-gram cache; None for other processes."""
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(state) / NGRAM_CACHE_DIRECTORY_NAME if state else None


def open_ngram_cache(draft: DraftSettings, manifest: Manifest, default_directory: Path | None) -> NgramCache | None:
    """Open the n-gram cache; None if it is switched off. A disk that fails is logged, and the cache works without it.

    Args:
        default_directory: where to keep it if the settings name no directory; None keeps it in memory only.
    """
    from edge_runtime.ngram_cache import NgramCache, NgramStore

    if not draft.ngram_cache:
        return None
    directory = draft.ngram_cache_directory or default_directory
    store = NgramStore(directory, manifest.vocabulary.hash) if directory else None
    return NgramCache(manifest.architecture.vocabulary_size, store)
