"""The draft model that the options and settings of a command name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.settings import DraftSettings, Settings

# Imported by every command; this is slow to import.
if TYPE_CHECKING:
    from edge_runtime.draft import OnnxDraft

# Part of a source checkout only, not of an installed package.
EXAMPLE_FAMILY = Path(__file__).resolve().parents[2] / "export" / "example_family"


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
