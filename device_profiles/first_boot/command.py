"""`device-profile configure`: run by a board at boot, before its service."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.terminal import print_note

DESCRIPTION = """\
Run at boot by flexspec-configure.service. Applies flexspec.toml of the boot partition (host name, Wi-Fi, SSH keys, the
service's settings) if it has changed since, moves its secrets to where systemd reads credentials, and removes them from
the file. If it has errors, nothing changes; they are printed, written to flexspec-errors.txt beside it, and shown above
the login prompt, and an LED blinks slowly. A bundle.tar.gz beside it is installed as the draft.

examples:
  device-profile configure --check flexspec.toml      # on any machine: report every error, change nothing
  sudo device-profile configure                       # apply a change now, without a reboot
"""
BOOT_PARTITION = Path("/boot/firmware")
BUNDLE_NAME = "bundle.tar.gz"


def add_parser(commands: Any) -> None:
    """Add `configure` to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "configure",
        help="apply flexspec.toml to this board",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="check this file, and change nothing")
    add_option(parser, "--boot DIR", "where the boot partition is mounted", default=BOOT_PARTITION)
    add_option(parser, "--root DIR", "root directory of the board", default=Path("/"))
    add_flag(parser, "--grow", "first grow the root file system to the end of the card")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code: 0, or 2 if flexspec.toml has errors."""
    from device_profiles.first_boot.board_file import FILE_NAME, read_board_file
    from edge_runtime.settings.loading import ConfigurationError

    if options.check:
        read_board_file(options.check)
        print(f"{options.check}: valid")
        return 0
    errors = [*(_grow() if options.grow else []), *_settle_update(options.root)]
    source = options.boot / FILE_NAME
    if source.exists():
        try:
            _apply(source, options.root)
        except ConfigurationError as error:
            errors += [f"{source.name}: nothing was changed, because of {str(error).splitlines()[0]}"]
            errors += [str(problem).removeprefix(f"{options.boot}/") for problem in error.problems]
        except OSError as error:
            errors.append(f"{source.name} could not be applied: {error}")
    errors += _install_bundle(options.boot / BUNDLE_NAME, options.root)
    from device_profiles.first_boot.report import report

    report(options.root, options.boot, errors)
    for line in errors:
        print_note(f"flexspec: {line}")
    return 2 if errors else 0


def _apply(source: Path, root: Path) -> None:
    from device_profiles.first_boot.apply import BoardRoot
    from device_profiles.first_boot.board_file import read_board_file

    board = BoardRoot(root)
    if board.is_current(source.read_bytes()):
        return
    file = read_board_file(source, board.is_stored)
    done = board.apply(file, source)
    if root == Path("/"):
        _use_now(file.tables.board.hostname, file.tables.wifi.country)
    board.finish(file, source)
    print(f"flexspec: {source.name} applied: {'; '.join(done)}")
    for warning in file.settings.warnings:
        print(f"flexspec: {warning}")


def _use_now(hostname: str, country: str) -> None:
    """Make the running system use what otherwise takes effect at its next boot, as far as its programs allow."""
    commands = []
    if hostname:
        commands.append(["hostname", hostname])
    if country:
        # A radio without a country is blocked on Raspberry Pi OS.
        commands += [["iw", "reg", "set", country], ["rfkill", "unblock", "wlan"]]
    for command in commands:
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            print_note(f"flexspec: `{' '.join(command)}` failed: {error}")


def _grow() -> list[str]:
    from device_profiles.first_boot.growth import grow_root

    try:
        if done := grow_root():
            print(f"flexspec: {done}")
    except subprocess.CalledProcessError as error:
        return [f"the root file system could not be grown: {(error.stderr or str(error)).strip()}"]
    except OSError as error:
        return [f"the root file system could not be grown: {error}"]
    return []


def _settle_update(root: Path) -> list[str]:
    """Undo an update of the program that was on trial when the board lost power. Returns errors."""
    from edge_runtime.protocol.errors import FlexSpecError
    from edge_runtime.updates.slots import HOME, Slots

    home = root / HOME.relative_to("/")
    try:
        if home.is_symlink() and (version := Slots(home).settle()):
            return [f"an update of FlexSpec was interrupted; the version in use is again: {version}"]
    except (OSError, FlexSpecError) as error:
        return [f"the interrupted update of FlexSpec could not be undone: {error}"]
    return []


def _install_bundle(archive: Path, root: Path) -> list[str]:
    """Install the draft beside flexspec.toml, unless it was installed before. Returns errors."""
    from device_profiles.first_boot.apply import BoardRoot
    from edge_runtime.protocol.errors import FlexSpecError

    try:
        if archive.exists() and (name := BoardRoot(root).install_bundle(archive)):
            print(f"flexspec: draft {name} installed")
    except (OSError, FlexSpecError) as error:
        return [f"{archive.name} could not be installed: {error}"]
    return []
