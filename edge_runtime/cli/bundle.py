"""`edge-runtime bundle`: install, switch, check and remove draft bundles."""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.settings_options import add_config_option, add_settings, read_settings
from edge_runtime.common.options import add_action, add_flag, add_option
from edge_runtime.common.terminal import new_console, print_line, print_note

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.bundles.self_test import SelfTestReport
    from edge_runtime.bundles.store import BundleStore, StoredBundle

HELP = "install, switch, check and remove draft bundles"
DESCRIPTION = """\
Manages the store of draft bundles. A new bundle is copied and checked (hashes; signature, if a key is configured; a
self-test in a process of its own). Only then does it become the current bundle; the one before it becomes `previous`.
If the current bundle fails its self-test when a service starts, the previous one is used instead.

examples:
  edge-runtime bundle install draft-2.tar.gz
  edge-runtime bundle install /media/usb/bundle --no-use
  edge-runtime bundle list
  edge-runtime bundle use previous
  edge-runtime bundle verify                               # all bundles in the store
  edge-runtime bundle verify ./bundle --key maker.pub      # a directory outside the store
"""

# Columns of the table if the output is not a terminal: enough for one line per bundle. Chosen.
PIPE_COLUMNS = 300


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    add_settings(shared, "draft.store", "draft.public_key_file")
    add_config_option(shared)

    install = add_action(
        actions, "install", _install, "copy a bundle into the store and make it the current one", parents=[shared]
    )
    install.add_argument("source", type=Path, metavar="SOURCE", help="directory of a bundle, or a tar archive of one")
    add_flag(install, "--no-use", "keep the current bundle in use")
    add_option(install, "--keep N", "old bundles to keep", default=1)

    name = "NAME@FINGERPRINT as printed by `list`, or one of the two, or `current` or `previous`"
    verify = add_action(
        actions, "verify", _verify, "check hashes and signatures, and run the self-test", parents=[shared]
    )
    verify.add_argument("name", nargs="?", metavar="NAME", help=f"{name}; or else a directory (default: all bundles)")
    listing = add_action(actions, "list", _list, "list the bundles in the store", parents=[shared])
    add_flag(listing, "--json", "print one JSON array instead of a table")
    use = add_action(actions, "use", _use, "make another bundle the current one", parents=[shared])
    remove = add_action(actions, "remove", _remove, "remove a bundle that is not the current one", parents=[shared])
    for action in (use, remove):
        action.add_argument("name", metavar="NAME", help=name)


async def _install(options: argparse.Namespace) -> int:
    store = _store(options)
    installed = store.install(options.source, use=not options.no_use, keep=options.keep)
    print_line(
        f"{installed.name}: {'in use' if not options.no_use else 'installed'}, {_format_speed(installed.self_test)}"
    )
    for name in installed.left_out:
        print_note(f"edge-runtime: warning: left out {name!r}: it is not in the manifest")
    for name in installed.removed:
        print_line(f"{name}: removed, because it was old")
    return 0


async def _verify(options: argparse.Namespace) -> int:
    from edge_runtime.protocol.errors import BundleError

    store = _store(options)
    paths = [store.locate(options.name)] if options.name else [store.path / name for name in store.names()]
    code = 0
    for path in paths:
        try:
            _, examination = store.check(path)
        except BundleError as error:
            print_note(f"edge-runtime: {error}")
            code = error.exit_code
        else:
            print_line(f"{path.name}: no errors, {_format_speed(examination)}")
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
    print_line(f"{_store(options).use(options.name)}: in use")
    return 0


async def _remove(options: argparse.Namespace) -> int:
    print_line(f"{_store(options).remove(options.name)}: removed")
    return 0


def _store(options: argparse.Namespace) -> BundleStore:
    """Return the configured store. Raises InputError."""
    from edge_runtime.bundles.store import BundleStore

    # asyncio delivers ^C to tasks that await, and none does here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draft = read_settings(options).draft
    return BundleStore(draft.store, draft.public_key_file)


def _format_speed(report: SelfTestReport) -> str:
    return f"loads in {report.load_seconds:.2g} s, {1e3 * report.step_seconds:.2g} ms per token"


def _print_table(entries: list[StoredBundle]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("bundle", "state", "installed", "MB", "weights", "shares", "signature", "problem"):
        table.add_column(header, justify="right" if header == "MB" else "left", overflow="fold")
    for entry in entries:
        when = datetime.datetime.fromtimestamp(entry.installed).astimezone()
        cells = (
            entry.name,
            entry.state,
            f"{when:%Y-%m-%d %H:%M}",
            f"{entry.bytes / 1e6:.1f}",
            entry.weights,
            entry.shared,
            entry.signature,
            entry.problem,
        )
        table.add_row(*cells)
    new_console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)
