"""Former names of options, which still work and warn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import DeprecatedOption
from edge_runtime.common.terminal import print_note


def warn(message: str) -> None:
    """Print a note to standard error."""
    print_note(f"draft-export: {message}")


def add_former_start_option(parser: argparse.ArgumentParser) -> None:
    """Accept --start for --from-draft. torchrun takes it for an abbreviation of an option of its own."""
    _add_former_option(parser, "--start", "--from-draft", type=Path)


def add_former_memory_option(parser: argparse.ArgumentParser) -> None:
    """Accept --memory for --ngram-cache."""
    _add_former_option(parser, "--memory", "--ngram-cache", dest="ngram_cache", const=True)


def _add_former_option(parser: argparse.ArgumentParser, name: str, replacement: str, **keywords: Any) -> None:
    """Accept an option under its former name; it keeps the default of the present one."""
    parser.add_argument(
        name,
        action=DeprecatedOption,
        replacement=replacement,
        warn=warn,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        **keywords,
    )
