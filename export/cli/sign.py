"""`draft-export keygen` and `draft-export sign`: keys and signatures of bundles. They work on the base install."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_option

KEYGEN_DESCRIPTION = """\
Makes a pair of Ed25519 keys in PEM: the private key for `draft-export sign`, and the public key for boards.

examples:
  draft-export keygen maker.key          # makes maker.key and maker.pub
  draft-export keygen --output maker     # the same
"""


def add_parser(commands: Any) -> None:
    """Add `keygen` and `sign` to argparse's sub-parsers."""
    keygen = commands.add_parser(
        "keygen",
        help="make a key pair for signing bundles",
        description=KEYGEN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    name = keygen.add_mutually_exclusive_group(required=True)
    name.add_argument(
        "key", nargs="?", type=Path, metavar="FILE", help="private key to make; the public key is written next to it"
    )
    add_option(name, "--output NAME", "make NAME.key and NAME.pub", type=Path)
    keygen.set_defaults(run=run_keygen)
    sign = commands.add_parser("sign", help="sign a bundle, so that boards can verify its origin")
    sign.add_argument("bundle", type=Path, help="directory of the bundle")
    add_option(sign, "--key FILE", "private key that `keygen` made", type=Path, required=True)
    sign.set_defaults(run=run_sign)


def run_keygen(options: argparse.Namespace) -> int:
    """Run `keygen`. Returns the exit code; raises FlexSpecError."""
    from export.bundle.sign import generate_key_pair

    private = options.key or options.output.with_name(f"{options.output.name}.key")
    public = generate_key_pair(private)
    print(f"{private}: keep it secret; {public}: for boards, as draft.public_key_file of their configuration")
    return 0


def run_sign(options: argparse.Namespace) -> int:
    """Run `sign`. Returns the exit code; raises FlexSpecError."""
    from export.bundle.sign import sign_bundle

    print(f"{sign_bundle(options.bundle, options.key)}: signed")
    return 0
