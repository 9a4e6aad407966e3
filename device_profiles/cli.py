"""`device-profile`: what boards are, and what a draft would cost on them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from device_profiles.profile import Profile, ProfileError, read_profile, shipped_profiles

DESCRIPTION = """\
What a board is: speed, power, and where the figures come from.

examples:
  device-profile list
  device-profile show raspberry-pi-5 --weights export/family/bundle/model.onnx.data
  device-profile validate my-board.toml
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="device-profile", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="the shipped profiles")
    listing.set_defaults(run=_list)
    show = commands.add_parser("show", help="one profile")
    show.add_argument("profile", help="name of a shipped profile, or a TOML file")
    show.add_argument("--weights", type=Path, help="a draft's weight file: adds its modelled cost per token")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=_show)
    validate = commands.add_parser("validate", help="check TOML files")
    validate.add_argument("files", nargs="+", type=Path)
    validate.set_defaults(run=_validate)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except ProfileError as error:
        print(f"device-profile: {error}", file=sys.stderr)
        return 2


def _list(options: argparse.Namespace) -> int:
    for profile in shipped_profiles():
        print(f"{profile.name:20} {profile.title:28} {profile.origin}")
    return 0


def _show(options: argparse.Namespace) -> int:
    profile = _find(options.profile)
    facts = msgspec.to_builtins(profile)
    if options.weights:
        try:
            size = options.weights.stat().st_size
        except OSError as error:
            raise ProfileError(f"cannot read {options.weights}: {error.strerror}") from None
        facts["modelled_draft_milliseconds"] = round(1e3 * profile.draft_seconds(size), 3)
        facts["modelled_draft_joules"] = profile.draft_joules(size)
    if options.json:
        print(msgspec.json.encode(facts).decode())
        return 0
    for name, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        print(f"{name:28} {lines[0]}")
        for line in lines[1:]:
            print(f"{'':28} {line}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    for file in options.files:
        read_profile(file)
        print(f"{file}: fine")
    return 0


def _find(name: str) -> Profile:
    shipped = {profile.name: profile for profile in shipped_profiles()}
    if name in shipped:
        return shipped[name]
    if name.endswith(".toml"):
        return read_profile(Path(name))
    raise ProfileError(f"no shipped profile {name!r}: there are {', '.join(shipped)}; or give a .toml file")


if __name__ == "__main__":
    raise SystemExit(main())
