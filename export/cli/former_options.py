"""Former names of options, which still work and warn."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_runtime.common.options import DeprecatedOption
from edge_runtime.common.terminal import print_note


def warn(message: str) -> None:
    """Print a note to standard error."""
    print_note(f"draft-export: {message}")


def add_former_start_option(parser: argparse.ArgumentParser) -> None:
    """Accept --start for --from-draft. torchrun takes it for an abbreviation of an option of its own."""
    parser.add_argument(
        "--start",
        action=DeprecatedOption,
        replacement="--from-draft",
        warn=warn,
        type=Path,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def add_former_memory_option(parser: argparse.ArgumentParser) -> None:
    """Accept --memory for --ngram-cache."""
    parser.add_argument(
        "--memory",
        action=DeprecatedOption,
        replacement="--ngram-cache",
        warn=warn,
        dest="ngram_cache",
        const=True,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
