"""`edge-runtime config`: check the configuration, show the effective settings, or print a reference of all."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli.settings_options import warn
from edge_runtime.common.options import add_action, add_flag
from edge_runtime.settings import SETTINGS, TABLES, SettingEntry, describe_type
from edge_runtime.systemd.actions import BOARD_UNIT

if TYPE_CHECKING:
    from edge_runtime.settings.loading import EffectiveSettings

# Of the unit that `edge-runtime service install` writes by default.
SERVICE_STATE_DIRECTORY = f"/var/lib/{BOARD_UNIT.state_directory}"

HELP = "check the configuration, show the effective settings, or print all settings"
DESCRIPTION = """\
The configuration is one TOML file: the one given, else $FLEXSPEC_CONFIG, else flexspec/config.toml below
$XDG_CONFIG_HOME (~/.config), else /etc/flexspec/config.toml. FLEXSPEC_<TABLE>__<FIELD> in the environment overrides it,
and command-line options override both.

examples:
  edge-runtime config check /etc/flexspec/config.toml      # every error with its line; exit code 2 if there is one
  edge-runtime config show                                 # as TOML, with the origin of each value
  FLEXSPEC_PLANNER__POLICY=ucb edge-runtime config show --json
  edge-runtime config reference                            # all settings, as Markdown
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = add_action(actions, "check", _check, "list every error with its line, and what `serve` would refuse")
    show = add_action(actions, "show", _show, "print every value and its origin; secrets stay in their files")
    add_flag(show, "--json", "print one JSON object instead of TOML")
    for action in (check, show):
        action.add_argument(
            "file", nargs="?", type=Path, metavar="FILE", help="default: see `edge-runtime config --help`"
        )
    add_action(actions, "reference", _reference, "print all settings as Markdown: type, default, option, variable")


def markdown_reference() -> str:
    """Return a Markdown table of all settings per TOML table."""
    lines = []
    for table, struct in TABLES.items():
        summary = (struct.__doc__ or "").partition(": ")[2]
        lines += [
            f"### [{table}]",
            "",
            f"{summary[0].upper()}{summary[1:]}",
            "",
            "| setting | value | default | option | environment | meaning |",
            "|---|---|---|---|---|---|",
            *(_markdown_row(entry) for entry in SETTINGS.values() if entry.table == table),
            "",
        ]
    return "\n".join(lines).rstrip("\n")


def _markdown_row(entry: SettingEntry) -> str:
    spec = entry.spec
    variables = ", ".join(f"`{name}`" for name in (spec.variable, entry.variable) if name)
    notes = [
        *([f"Credential `{spec.credential}`."] if spec.credential else []),
        *(["Applied on reload."] if spec.reloadable else []),
    ]
    meaning = " ".join([f"{spec.help[0].upper()}{spec.help[1:]}.", *notes])
    cells = (f"`{entry.name}`", describe_type(entry.type), entry.default, f"`{spec.option}`", variables, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


async def _check(options: argparse.Namespace) -> int:
    """Check the configuration as `serve` does."""
    from edge_runtime.cli import serve
    from edge_runtime.cli.serve_checks import check_serve

    effective = _read(options)
    parser = argparse.ArgumentParser()
    serve.add_options(parser)
    setup = check_serve(parser.parse_args([]), effective.settings)
    await setup.client.aclose()
    print(f"{effective.file or 'no file, only defaults and the environment'}: no errors; `serve` accepts it")
    if setup.bundle is None:
        print(f"no draft bundle is installed in {setup.settings.draft.store}, so none was checked")
    return 0


async def _show(options: argparse.Namespace) -> int:
    import msgspec

    effective = _read(options)
    if options.json:
        values: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        for key, entry in SETTINGS.items():
            value = {"value": effective.settings.get(key), "origin": effective.origins[key]}
            values[entry.table][entry.name] = value
        report = {"file": effective.file, "values": values, "warnings": effective.warnings}
        print(msgspec.json.encode(report, enc_hook=str).decode())
    else:
        print("\n".join(_format_toml(effective)))
    return 0


async def _reference(options: argparse.Namespace) -> int:
    print(markdown_reference())
    return 0


def _read(options: argparse.Namespace) -> EffectiveSettings:
    """Read the effective settings and print their warnings. Raises ConfigurationError."""
    from edge_runtime.settings import loading

    file, environ = loading.find_file(options.file, os.environ), dict(os.environ)
    if file is not None and file.resolve().is_relative_to(loading.SYSTEM_FILE.parent):
        # This is the service's file, whatever the shell is: its bundle store is that of the service.
        environ.setdefault("STATE_DIRECTORY", SERVICE_STATE_DIRECTORY)
    effective = loading.read_effective_settings(options.file, environ)
    for warning in effective.warnings:
        warn(warning)
    return effective


def _format_toml(effective: EffectiveSettings) -> Iterator[str]:
    """Yield the lines of a TOML file with the same settings, and the origins as comments."""
    import tomlkit

    yield f"# {effective.file or 'no configuration file'}"
    for table in TABLES:
        yield f"\n[{table}]"
        for key, entry in SETTINGS.items():
            if entry.table != table:
                continue
            value = effective.settings.get(key)
            if value is None:
                yield f"# {entry.name} is not set"
            else:
                written = tomlkit.item(str(value) if isinstance(value, Path) else value).as_string()
                yield f"{f'{entry.name} = {written}':48}  # {effective.origins[key]}"
