"""`edge-runtime bundle`: puts draft bundles onto the board, switches between them, and looks after them."""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from edge_runtime.bundles.self_test import Examination
    from edge_runtime.bundles.store import BundleStore, Entry

DESCRIPTION = """\
Keeps draft bundles in a store. A new one is copied, checked (hashes, signature where a key is configured, a self-test
in a process of its own) and only then takes the place of the current one, which is kept as the previous one. Where the
current one fails its self-test when a service starts, the previous one is used instead.

examples:
  edge-runtime bundle install draft-2.tar.gz
  edge-runtime bundle install /media/usb/bundle --no-use
  edge-runtime bundle list
  edge-runtime bundle use previous
  edge-runtime bundle verify                               # all of them
  edge-runtime bundle verify ./bundle --key maker.pub      # one that is not in the store
"""


PIPE_WIDTH = 300


def add_parser(commands: Any) -> None:
    """Adds `bundle` to argparse's sub-parsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        "bundle", help="install, switch, check and remove draft bundles", description=DESCRIPTION, formatter_class=raw
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--store", type=Path, metavar="DIR", help="default: draft.store of the configuration")
    shared.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="public keys of which one must have signed (default: draft.public_key_file of the configuration)",
    )
    shared.add_argument("--config", type=Path, metavar="FILE", help="default: as `edge-runtime config`")

    install = actions.add_parser("install", parents=[shared], help="put a bundle into the store, and use it")
    install.add_argument("source", type=Path, metavar="SOURCE", help="a bundle's directory, or a tar archive of one")
    install.add_argument("--no-use", action="store_true", help="leave the current one in use")
    install.add_argument(
        "--keep", type=int, default=1, metavar="N", help="how many old bundles to keep (default: %(default)s)"
    )
    install.set_defaults(run=_install)

    name = "NAME@FINGERPRINT, as `list` shows, or one of the two; `current` or `previous`"
    verify = actions.add_parser("verify", parents=[shared], help="check hashes, signatures, and that the draft works")
    verify.add_argument(
        "name", nargs="?", metavar="NAME", help=f"{name}; or a directory, with a / in it (default: all bundles)"
    )
    verify.set_defaults(run=_verify)

    listing = actions.add_parser("list", parents=[shared], help="what is in the store")
    listing.add_argument("--json", action="store_true", help="print one JSON array instead of a table")
    listing.set_defaults(run=_list)

    use = actions.add_parser("use", parents=[shared], help="make another bundle the current one")
    use.add_argument("name", metavar="NAME", help=name)
    use.set_defaults(run=_use)

    remove = actions.add_parser("remove", parents=[shared], help="remove a bundle that is not the current one")
    remove.add_argument("name", metavar="NAME", help=name)
    remove.set_defaults(run=_remove)


async def _install(options: argparse.Namespace) -> int:
    store = _store(options)
    installed = store.install(options.source, use=not options.no_use, keep=options.keep)
    print(f"{installed.name}: {'in use' if not options.no_use else 'installed'}, {_speed(installed.examination)}")
    for name in installed.left_out:
        print(f"edge-runtime: warning: left out {name}: the manifest does not name it", file=sys.stderr)
    for name in installed.removed:
        print(f"{name}: removed, as it was old")
    return 0


async def _verify(options: argparse.Namespace) -> int:
    from edge_runtime.protocol.errors import BundleError

    store = _store(options)
    if options.name and "/" in options.name:
        paths = [Path(options.name)]
    else:
        paths = [store.path / name for name in ([store.find(options.name)] if options.name else store.names())]
    code = 0
    for path in paths:
        try:
            _, examination = store.check(path)
        except BundleError as error:
            print(f"edge-runtime: {error}", file=sys.stderr)
            code = error.exit_code
        else:
            print(f"{path.name}: fine, {_speed(examination)}")
    return code


async def _list(options: argparse.Namespace) -> int:
    import msgspec

    entries = _store(options).entries()
    if options.json:
        print(msgspec.json.encode(entries).decode())
    else:
        _print_table(entries)
    return 0


async def _use(options: argparse.Namespace) -> int:
    print(f"{_store(options).use(options.name)}: in use")
    return 0


async def _remove(options: argparse.Namespace) -> int:
    print(f"{_store(options).remove(options.name)}: removed")
    return 0


def _store(options: argparse.Namespace) -> BundleStore:
    """The store that the options, or else the configuration, name. Raises InputError."""
    from edge_runtime.bundles.store import BundleStore
    from edge_runtime.settings.loading import read_configuration

    # asyncio leaves ^C to tasks that wait, and none does here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draft = read_configuration(options.config, os.environ).draft
    return BundleStore(options.store or draft.store, options.key or draft.public_key_file)


def _speed(examination: Examination) -> str:
    return f"loads in {examination.load_seconds:.2g} s, {1e3 * examination.step_seconds:.2g} ms per token"


def _print_table(entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("bundle", "state", "installed", "MB", "weights", "shares", "signature", "problem"):
        table.add_column(header, justify="right" if header == "MB" else "left", overflow="fold")
    for entry in entries:
        when = datetime.datetime.fromtimestamp(entry.installed).astimezone()
        table.add_row(
            entry.name,
            entry.state,
            f"{when:%Y-%m-%d %H:%M}",
            f"{entry.bytes / 1e6:.1f}",
            entry.weights,
            entry.shared,
            entry.signature,
            entry.problem,
        )
    # A pipe has no width, and whatever reads it wants one line for each.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
