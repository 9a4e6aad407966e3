"""Loads the settings from the configuration file, systemd credentials and the environment.

The file is the one named, else $FLEXSPEC_CONFIG, else flexspec/config.toml below $XDG_CONFIG_HOME (~/.config), else
/etc/flexspec/config.toml, else there is none. Precedence: environment over file over credentials over defaults.
Command-line options override all of them (`cli.settings_options`).

Environment variables are FLEXSPEC_<TABLE>__<FIELD>, such as FLEXSPEC_PLANNER__POLICY=ucb, with commas between the
strings of a list. FLEXSPEC_BUNDLE and FLEXSPEC_VERIFIER are short for FLEXSPEC_DRAFT__BUNDLE and
FLEXSPEC_VERIFIER__URLS, which override them. An empty variable counts as not set.

Neither file nor environment ever holds a secret: settings name files that hold them, or systemd passes them as
credentials. A relative path in a file starts at that file's directory.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from edge_runtime.common.credentials import find_credential
from edge_runtime.common.network import is_loopback
from edge_runtime.common.options import describe_removal
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import toml_positions, validators
from edge_runtime.settings.table import (
    ENVIRONMENT_PREFIX,
    REMOVED_FEATURES,
    SETTINGS,
    TABLES,
    Settings,
    default_store,
    xdg_directory,
)

logger = logging.getLogger(__name__)

SYSTEM_FILE = Path("/etc/flexspec/config.toml")
SHORT_VARIABLES = {entry.spec.variable: entry for entry in SETTINGS.values() if entry.spec.variable}
# Keys of what was removed, and its name.
REMOVED_KEYS = {key: feature.name for feature in REMOVED_FEATURES for key in feature.keys}
# What people call a secret, and the setting that names the file where it belongs.
MISTAKEN_NAMES = {name: entry for entry in SETTINGS.values() for name in entry.spec.mistaken_names}


class Origin(msgspec.Struct, frozen=True):
    """Where a value comes from.

    Attributes:
        kind: `default`, `file`, `environment` or `credential`.
        name: name of the file or the variable.
        line, column: in the file, from 1; 0 if unknown.
    """

    kind: Literal["default", "file", "environment", "credential"]
    name: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return ":".join([self.name, *(str(number) for number in (self.line, self.column) if number)])
        return {"default": "default", "credential": f"credential {self.name}"}.get(self.kind, f"${self.name}")


class Problem(NamedTuple):
    """One error in the configuration, and where it is."""

    origin: Origin
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


class ConfigurationError(InputError):
    """The configuration has errors; the message has one line for each.

    Attributes:
        problems: all errors, those in the file first and in its order.
    """

    def __init__(self, problems: list[Problem]) -> None:
        kinds = ("file", "environment", "credential", "default")
        self.problems = sorted(problems, key=lambda p: (kinds.index(p.origin.kind), p.origin.line, p.origin.column))
        count = f"{len(problems)} errors" if len(problems) > 1 else "an error"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, self.problems)]))


class EffectiveSettings(msgspec.Struct, frozen=True):
    """The settings and their origins.

    Attributes:
        file: the file that was read; None if there was none.
        origins: origin of every setting, by key such as `draft.threads`.
        warnings: what works but should be changed, one sentence each.
    """

    settings: Settings
    file: Path | None
    origins: dict[str, Origin]
    warnings: list[str]


class _SourceValue(NamedTuple):
    value: Any
    origin: Origin
    folder: Path


class _Source:
    """The values of one source (file or environment), and what is wrong with it."""

    def __init__(self, problems: list[Problem], warnings: list[str]) -> None:
        self.values: dict[str, _SourceValue] = {}
        self._problems = problems
        self._warnings = warnings

    def add(self, table: str, name: str, value: Any, origin: Origin, folder: Path) -> None:
        """Add a value; if there is no such setting, add a problem instead, or a warning if there used to be."""
        key = f"{table}.{name}"
        if key in SETTINGS:
            self.values[key] = _SourceValue(value, origin, folder)
        elif key in REMOVED_KEYS:
            self._warnings.append(f"{origin}: {key} {describe_removal(REMOVED_KEYS[key])}")
        else:
            self.report(origin, _describe_unknown_field(table, name))

    def report(self, origin: Origin, message: str) -> None:
        self._problems.append(Problem(origin, message))


def read_settings(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from the file at `path`, or from the one that is used by default, and the environment.

    Warnings are logged. Raises ConfigurationError, which lists every error.
    """
    effective = read_effective_settings(path, environ)
    for warning in effective.warnings:
        logger.warning(warning)
    return effective.settings


def read_effective_settings(
    path: Path | None = None, environ: Mapping[str, str] = os.environ, *, other_tables: Collection[str] = ()
) -> EffectiveSettings:
    """Read the settings like `read_settings`; also return where each value comes from, and the warnings.

    Args:
        other_tables: tables of the file that are not settings, which are skipped.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    file = find_file(path, environ)
    sources = _read_credentials(environ)
    if file is not None:
        sources |= _read_file(file, _Source(problems, warnings), other_tables)
    sources |= _read_environment(environ, _Source(problems, warnings))
    values: dict[str, Any] = {"draft.store": default_store(environ)}
    origins = dict.fromkeys(SETTINGS, Origin("default"))
    for key, (value, origin, folder) in sources.items():
        origins[key] = origin
        entry = SETTINGS[key]
        try:
            values[key] = entry.check(value, folder)
        except InputError as error:
            problems.append(Problem(origin, f"{key}: {error}"))
    if problems:
        raise ConfigurationError(problems)
    settings = Settings().replace(values)
    return EffectiveSettings(settings, file, origins, [*warnings, *_find_risks(settings)])


def find_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Return the configuration file to read; None if there is none. A file that is named need not exist."""
    named = path or environ.get("FLEXSPEC_CONFIG")
    if named:
        return Path(named)
    home = xdg_directory(environ, "XDG_CONFIG_HOME", ".config")
    candidates = [*([home / "flexspec" / "config.toml"] if home else []), SYSTEM_FILE]
    return next((file for file in candidates if os.path.lexists(file)), None)


def _read_credentials(environ: Mapping[str, str]) -> dict[str, _SourceValue]:
    return {
        key: _SourceValue(str(path), Origin("credential", entry.spec.credential), Path())
        for key, entry in SETTINGS.items()
        if entry.spec.credential and (path := find_credential(entry.spec.credential, environ))
    }


def _read_file(file: Path, source: _Source, other_tables: Collection[str]) -> dict[str, _SourceValue]:
    at = functools.partial(Origin, "file", str(file))
    try:
        document = toml_positions.parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file; leave it out for defaults" if missing else f"cannot be read: {error.strerror}"
        source.report(at(), reason)
        return {}
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        source.report(at(line), "is not UTF-8; save it as UTF-8")
        return {}
    except toml_positions.TomlError as error:
        source.report(at(*error.position), f"not TOML: {error}; correct it there")
        return {}

    for table, fields in document.values.items():
        if table in other_tables:
            continue
        origin = at(*document.position((table,)))
        if table not in TABLES:
            source.report(origin, _describe_unknown_table(table))
        elif not isinstance(fields, dict):
            source.report(origin, f"{table}: must be a table; write [{table}], and its fields below")
        else:
            for name, value in fields.items():
                origin = at(*document.position((table, name)))
                source.add(table, name, value, origin, file.parent)
    return source.values


def _read_environment(environ: Mapping[str, str], source: _Source) -> dict[str, _SourceValue]:
    # Short variables come first, so that the long ones override them.
    for variable in sorted(environ, key=lambda variable: (variable not in SHORT_VARIABLES, variable)):
        origin, text = Origin("environment", variable), environ[variable]
        if entry := SHORT_VARIABLES.get(variable):
            table, name = entry.table, entry.name
        else:
            table, separator, name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
            if not (variable.startswith(ENVIRONMENT_PREFIX) and separator):
                continue
        key = f"{table}.{name}"
        if table not in TABLES:
            source.report(origin, _describe_unknown_table(table))
        elif text or key not in SETTINGS.keys() | REMOVED_KEYS.keys():
            value = validators.from_text(text, SETTINGS[key].type) if key in SETTINGS else text
            source.add(table, name, value, origin, Path())
    return source.values


def _describe_unknown_table(table: str) -> str:
    if advice := _suggest_place(table):
        return f"{table}: {advice}"
    close = difflib.get_close_matches(table, TABLES, 1)
    advice = f"did you mean [{close[0]}]?" if close else f"there are {', '.join(f'[{name}]' for name in TABLES)}"
    return f"there is no table {json.dumps(table, ensure_ascii=False)}; {advice}"


def _describe_unknown_field(table: str, name: str) -> str:
    if advice := _suggest_place(name):
        return f"{table}.{name}: {advice}"
    fields = [entry.name for entry in SETTINGS.values() if entry.table == table]
    close = difflib.get_close_matches(name, fields, 1)
    advice = f"did you mean {close[0]}?" if close else f"[{table}] has {', '.join(fields)}"
    return f"{table}.{name}: there is no such field; {advice}"


def _suggest_place(name: str) -> str:
    """Return where a misplaced field or secret belongs; empty if `name` is neither."""
    if entry := MISTAKEN_NAMES.get(name.lower().replace("-", "_")):
        return (
            f"secrets do not belong here; put it into a file that only its user can read, and name that file as "
            f"{entry.key}, or pass it as the systemd credential {entry.spec.credential}"
        )
    return next((f"belongs in [{entry.table}]" for entry in SETTINGS.values() if entry.name == name), "")


def _find_risks(settings: Settings) -> Iterator[str]:
    service = settings.service
    for key, entry in SETTINGS.items():
        file = settings.get(key) if entry.spec.credential else None
        if file is not None and file.stat().st_mode & 0o004:
            yield f"{key}: every user of this machine can read {file}; run `chmod o-r` on it"
    if service.api_key_file is None and not is_loopback(service.host):
        yield (
            f"service.host: everyone who can reach {service.host} can use the service; set service.api_key_file to "
            "require a key"
        )
