"""`edge-runtime config`: whether the configuration is right, and what it comes to."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from edge_runtime.settings.loading import Effective

DESCRIPTION = """\
The configuration is one TOML file: the one given, else $FLEXSPEC_CONFIG, else flexspec/config.toml below
$XDG_CONFIG_HOME (~/.config), else /etc/flexspec/config.toml. FLEXSPEC_<TABLE>__<FIELD> in the environment overrides it.

examples:
  edge-runtime config check /etc/flexspec/config.toml      # every error with its line; exit code 2 if there is one
  edge-runtime config show                                 # as TOML, with where each value comes from
  FLEXSPEC_PLANNER__POLICY=ucb edge-runtime config show --json
"""


def add_parser(commands: Any) -> None:
    """Adds `config` to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "config",
        help="check the configuration, or show what it comes to",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="name every error with its line")
    check.set_defaults(run=_check)
    show = actions.add_parser("show", help="print every value and where it comes from; secrets stay in their files")
    show.add_argument("--json", action="store_true", help="print one JSON object instead of TOML")
    show.set_defaults(run=_show)
    for action in (check, show):
        action.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: where services look")


async def _check(options: argparse.Namespace) -> int:
    effective = _read(options)
    print(f"{effective.file or 'no file, only defaults and the environment'}: fine")
    return 0


async def _show(options: argparse.Namespace) -> int:
    import msgspec

    effective = _read(options)
    if options.json:
        print(msgspec.json.encode(_report(effective), enc_hook=str).decode())
    else:
        print("\n".join(_toml(effective)))
    return 0


def _read(options: argparse.Namespace) -> Effective:
    """The effective configuration, its warnings on standard error. Raises ConfigurationError."""
    from edge_runtime.settings.loading import read_effective

    effective = read_effective(options.file, os.environ)
    for warning in effective.warnings:
        print(f"edge-runtime: warning: {warning}", file=sys.stderr)
    return effective


def _report(effective: Effective) -> dict[str, Any]:
    values: dict[str, dict[str, Any]] = {}
    for (table, name), origin in effective.origins.items():
        value = getattr(getattr(effective.configuration, table), name)
        values.setdefault(table, {})[name] = {"value": value, "origin": origin}
    return {"file": effective.file, "values": values, "warnings": effective.warnings}


def _toml(effective: Effective) -> Iterator[str]:
    """Lines of a TOML file that says the same, with origins as comments."""
    import tomlkit

    yield f"# {effective.file or 'no configuration file'}"
    table = ""
    for (inside, name), origin in effective.origins.items():
        if inside != table:
            table = inside
            yield f"\n[{table}]"
        value = getattr(getattr(effective.configuration, table), name)
        if value is None:
            yield f"# {name} is not set"
        else:
            written = tomlkit.item(str(value) if isinstance(value, Path) else value).as_string()
            yield f"{f'{name} = {written}':48}  # {origin}"
