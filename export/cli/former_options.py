"""Former options, which are accepted and warn."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_runtime.common.options import FormerOption, add_removed_option
from edge_runtime.common.terminal import print_note


def warn(message: str) -> None:
    """Print a note to standard error."""
    print_note(f"draft-export: {message}")


def add_former_start_option(parser: argparse.ArgumentParser) -> None:
    """Accept --start for --from-draft. torchrun takes it for an abbreviation of an option of its own."""
    parser.add_argument(
        "--start",
        action=FormerOption,
        advice="is deprecated; use --from-draft",
        warn=warn,
        # That of --from-draft applies.
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        type=Path,
    )


def add_removed_ngram_cache_options(parser: argparse.ArgumentParser) -> None:
    """Accept --ngram-cache and --memory, which do nothing."""
    for option in ("--ngram-cache", "--memory"):
        add_removed_option(parser, option, "n-gram cache", warn)
