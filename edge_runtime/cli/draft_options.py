"""Options of the draft model and its n-gram cache, and the objects that are made from them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.settings_options import add_settings
from edge_runtime.settings import DraftSettings, Settings

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


def load_draft(bundle: Path, settings: Settings) -> OnnxDraft:
    """Load the draft model of `bundle`, with the number of threads that is set, or else was best in a calibration.

    Raises BundleError and DraftError, and InputError if the board's profile cannot be read.
    """
    from edge_runtime.draft import OnnxDraft

    threads = settings.draft.threads or _calibrated_threads(bundle, settings.planner.profile)
    return OnnxDraft.load(bundle, threads=threads, prefix_cache_bytes=settings.draft.prefix_cache_mib << 20)


def _calibrated_threads(bundle: Path, profile: str) -> int:
    """Return the number of threads with which this draft is fastest on this board; 0 if it was not measured."""
    from edge_runtime.planning.board_profile import find_profile
    from edge_runtime.protocol.bundle import read_bundle

    measured = find_profile(profile).steady_measurement(read_bundle(bundle, verify=False).manifest) if profile else None
    return measured.threads if measured else 0


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

    if not (draft.ngram_cache_directory if draft.ngram_cache is None else draft.ngram_cache):
        return None
    directory = draft.ngram_cache_directory or default_directory
    store = NgramStore(directory, manifest.vocabulary.hash) if directory else None
    return NgramCache(manifest.architecture.vocabulary_size, store)
