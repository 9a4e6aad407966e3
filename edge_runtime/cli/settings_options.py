"""Command-line options made from the settings table, and the settings that result with the configuration.

Precedence: command line over environment over configuration file over credentials over defaults.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import inspect

from edge_runtime.common.options import ArgumentContainer, add_option, add_removed_option
from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import REMOVED_FEATURES, SETTINGS, SettingEntry, Settings, bare_type

# How an option's text becomes the value of its setting, by the setting's type; text that is not here stays as it is.
VALUE_PARSERS: dict[type[inspect.Type], Callable[[str], Any]] = {
    inspect.ListType: lambda text: [part.strip() for part in text.split(",")],
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.CustomType: Path,
}


def add_settings(parser: ArgumentContainer, *keys: str, default: str = "") -> None:
    """Add the options of the settings with these keys, such as `draft.threads`.

    The parsed namespace holds an option's value under the setting's key, and only if the option was given.

    Args:
        default: the default to show in the help, if this command's is not the table's.
    """
    for key in keys:
        entry = SETTINGS[key]
        spec = entry.spec
        arguments = {"dest": key, "default": argparse.SUPPRESS, "metavar": spec.metavar, **_value_arguments(entry)}
        text = spec.flag_help or spec.help
        # For an on/off setting, the default is that the option is not given.
        if not isinstance(entry.value, bool):
            text += f" (default: {default or entry.default})"
        parser.add_argument(spec.flag, help=text.replace("%", "%%"), **arguments)


def add_removed_options(parser: ArgumentContainer) -> None:
    """Accept the options of removed features."""
    for feature in REMOVED_FEATURES:
        for option in feature.options:
            add_removed_option(parser, option, feature.name, warn)


def add_config_option(parser: ArgumentContainer) -> None:
    """Add --config, the configuration file that applies if no option is given."""
    text = "configuration file; options override it (default: see `edge-runtime config --help`)"
    add_option(parser, "--config FILE", text, type=Path)


def read_settings(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings from the configuration, if the command reads it (--config), and the command line.

    Warnings are logged.

    Raises:
        ConfigurationError: the configuration has errors.
        InputError: an option has a value that its setting may not have.
    """
    from edge_runtime.settings import loading

    configured = loading.read_settings(options.config, environ) if hasattr(options, "config") else Settings()
    given = {key: value for key, value in vars(options).items() if key in SETTINGS}
    return configured.replace({key: _check(SETTINGS[key], value) for key, value in given.items()})


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print_note(f"edge-runtime: warning: {message}")


def _check(entry: SettingEntry, value: Any) -> Any:
    try:
        return entry.check(str(value) if isinstance(value, Path) else value, Path())
    except InputError as error:
        raise InputError(f"{entry.spec.flag}: {error}") from None


def _value_arguments(entry: SettingEntry) -> dict[str, Any]:
    """Return the arguments of `add_argument` that follow from a setting's type."""
    match bare_type(entry.type):
        case inspect.BoolType():
            return {"action": "store_const", "const": not entry.spec.option.startswith("--no-")}
        case inspect.LiteralType(values=values):
            return {"choices": [value for value in values if value]}
        case other:
            return {"type": VALUE_PARSERS.get(type(other), str)}
