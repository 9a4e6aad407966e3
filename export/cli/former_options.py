"""Former names of options, which still work and warn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_runtime.common.terminal import print_note


class _FormerOption(argparse.Action):
    """Stores a path under the present name of the option, with a warning."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print_note(f"draft-export: {option_string} is deprecated; use --from-draft")
        setattr(namespace, self.dest, values)


def add_former_start_option(parser: argparse.ArgumentParser) -> None:
    """Accept --start for --from-draft. torchrun takes it for an abbreviation of an option of its own."""
    parser.add_argument("--start", action=_FormerOption, type=Path, help=argparse.SUPPRESS)
