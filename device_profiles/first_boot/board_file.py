"""flexspec.toml: the configuration of one board, on the FAT partition of its card.

It has the tables of config.toml (`edge_runtime.settings.table`), and four more for what is not the service's:

    [board]
    hostname = "kitchen"
    timezone = "Europe/Berlin"

    [wifi]
    ssid = "home"
    password = "correct horse"          # moved to the board when it is read
    country = "DE"

    [ssh]
    keys = ["ssh-ed25519 AAAA... me@laptop"]

    [secrets]                           # moved to the board when they are read
    verifier_token = "..."
    api_key = "..."

    [verifier]
    urls = ["https://verifier.example"]

The board replaces a secret by STORED once it has it. A relative path, such as that of `verifier.ca_file`, names a file
beside flexspec.toml.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import tomlkit

from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import TABLES, VerifierSettings, check_verifier_settings, toml_positions
from edge_runtime.settings.loading import (
    ConfigurationError,
    EffectiveSettings,
    Origin,
    Problem,
    read_effective_settings,
)

FILE_NAME = "flexspec.toml"
# Stands in flexspec.toml for a secret that the board has already moved to its own storage.
STORED = "(stored on the board)"
# RFC 1123, one label: NetworkManager and mDNS append a domain.
HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
COUNTRY = re.compile(r"[A-Z]{2}")
# IEEE 802.11: a passphrase of 8 to 63 printable ASCII characters, or the key itself in hexadecimal.
WIFI_PASSWORD = re.compile(r"[\x20-\x7e]{8,63}|[0-9A-Fa-f]{64}")
MAX_SSID_BYTES = 32
SSH_KEY = re.compile(r"(sk-)?(ssh|ecdsa)-[a-z0-9@.-]+ (?P<data>[A-Za-z0-9+/]+=*)( .*)?")
# As HTTP headers require; see `edge_runtime.settings.validators.read_secret`.
HEADER_VALUE = re.compile(r"[\x21-\x7e]{1,16384}")
ZONES = Path("/usr/share/zoneinfo")


# Path of a key, and what is wrong with its value.
FieldProblem = tuple[tuple[str, ...], str]


class BoardTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[board]: empty values change nothing."""

    hostname: str = ""
    timezone: str = ""


class WifiTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[wifi]: the network to join; an empty `password` is that of an open one."""

    ssid: str = ""
    password: str = ""
    country: str = ""
    hidden: bool = False


class SshTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[ssh]: public keys whose owners may log in as root."""

    keys: list[str] = []


class SecretsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[secrets]: what becomes systemd credentials of the service."""

    verifier_token: str = ""
    api_key: str = ""
    verifier_key: str = ""


class BoardTables(msgspec.Struct, frozen=True):
    """The tables that are not settings of the service."""

    board: BoardTable = BoardTable()
    wifi: WifiTable = WifiTable()
    ssh: SshTable = msgspec.field(default_factory=SshTable)
    secrets: SecretsTable = SecretsTable()


OWN_TABLES: dict[str, type[msgspec.Struct]] = {field.name: field.type for field in msgspec.structs.fields(BoardTables)}
# Names in [secrets], and those of the credentials that the unit loads.
CREDENTIALS = {field.name: f"flexspec.{field.name.replace('_', '-')}" for field in msgspec.structs.fields(SecretsTable)}


class BoardFile(msgspec.Struct, frozen=True):
    """A valid flexspec.toml.

    Attributes:
        text: the file as it was read.
        tables: its own tables.
        settings: the settings of the service, from the other tables.
    """

    text: str
    tables: BoardTables
    settings: EffectiveSettings


def read_board_file(path: Path, is_stored: Callable[[str], bool] = lambda name: True) -> BoardFile:
    """Read and check flexspec.toml.

    Args:
        is_stored: whether the board has the secret `wifi.password`, `secrets.api_key`, ..., for which the file has
            STORED.

    Raises:
        ConfigurationError: it has errors; all of them are listed, with their lines.
    """
    problems: list[Problem] = []
    settings: EffectiveSettings | None = None
    try:
        settings = read_effective_settings(path, {}, other_tables=OWN_TABLES)
    except ConfigurationError as error:
        problems += map(_mention_own_tables, error.problems)
    tables, text = BoardTables(), ""
    # If the file cannot be read or parsed, the settings' loader has said so.
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8-sig")
        document = toml_positions.parse(text)
        tables, wrong = _convert_tables(document)
        wrong += _check(tables, is_stored)
        if settings is not None:
            wrong += _check_verifier(settings.settings.verifier, tables.secrets, path)
        problems += [Problem(Origin("file", str(path), *document.position(key)), message) for key, message in wrong]
    if problems or settings is None:
        raise ConfigurationError(problems)
    return BoardFile(text, tables, settings)


def hide_secrets(text: str) -> str:
    """Return the text of flexspec.toml with STORED in place of its secrets; comments and order stay."""
    document = tomlkit.parse(text)
    places = [("wifi", "password"), *(("secrets", name) for name in CREDENTIALS)]
    for table, name in places:
        if document.get(table, {}).get(name):
            document[table][name] = STORED
    return tomlkit.dumps(document)


def service_text(text: str) -> str:
    """Return the part of flexspec.toml that is the service's own configuration."""
    document = tomlkit.parse(text)
    for table in [name for name in document if name not in TABLES]:
        del document[table]
    return tomlkit.dumps(document).lstrip("\n")


def _mention_own_tables(problem: Problem) -> Problem:
    if not problem.message.startswith("there is no table"):
        return problem
    return problem._replace(message=f"{problem.message}; and here {', '.join(f'[{name}]' for name in OWN_TABLES)}")


def _convert_tables(document: toml_positions.TomlDocument) -> tuple[BoardTables, list[FieldProblem]]:
    tables: dict[str, Any] = {}
    problems = []
    for name, kind in OWN_TABLES.items():
        try:
            tables[name] = msgspec.convert(document.values.get(name, {}), kind)
        except msgspec.ValidationError as error:
            message, _, place = str(error).partition(" - at ")
            unknown = re.search(r"unknown field `(.*)`", message)
            key = (name, *([unknown[1]] if unknown else re.findall(r"\.(\w+)", place)))
            if unknown:
                message = f"there is no such field; [{name}] has {', '.join(kind.__struct_fields__)}"
            problems.append((key, f"{'.'.join(key)}: {message}"))
    return BoardTables(**tables), problems


def _check(tables: BoardTables, is_stored: Callable[[str], bool]) -> Iterator[FieldProblem]:
    for key, message in _wrong_values(tables, is_stored):
        yield tuple(key.split(".")), f"{key}: {message}"


def _wrong_values(tables: BoardTables, is_stored: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield the key and the description of every wrong value."""
    board, wifi = tables.board, tables.wifi
    if board.hostname and not HOSTNAME.fullmatch(board.hostname):
        yield "board.hostname", f"{board.hostname[:70]!r} is not a host name; use at most 63 of a-z, 0-9 and -"
    if board.timezone and not (".." not in board.timezone and (ZONES / board.timezone).is_file()):
        yield "board.timezone", f"{board.timezone[:40]!r} is not a time zone; write for instance Europe/Berlin"
    if wifi.ssid and len(wifi.ssid.encode()) > MAX_SSID_BYTES:
        yield "wifi.ssid", f"has more than {MAX_SSID_BYTES} bytes"
    if not wifi.ssid and (wifi.password or wifi.country):
        yield "wifi.ssid", "the name of the network is missing"
    if wifi.ssid and not COUNTRY.fullmatch(wifi.country):
        yield "wifi.country", "the radio needs its country, as two capital letters such as DE"
    if wifi.password == STORED:
        if not is_stored("wifi.password"):
            yield "wifi.password", "this board has not stored it; write the password again"
    elif wifi.password and not WIFI_PASSWORD.fullmatch(wifi.password):
        yield "wifi.password", "must have 8 to 63 ASCII characters, or be the key: 64 hexadecimal digits"
    for key in tables.ssh.keys:
        if "PRIVATE" in key:
            yield "ssh.keys", "this is a private key; write the public one, from the file that ends in .pub"
        elif not (match := SSH_KEY.fullmatch(key.strip())) or not _is_base64(match["data"]):
            yield "ssh.keys", f"{key[:30]!r} is not a public key; copy the line from the file that ends in .pub"
    for name in CREDENTIALS:
        value, key = getattr(tables.secrets, name), f"secrets.{name}"
        if value == STORED:
            if not is_stored(key):
                yield key, "this board has not stored it; write the secret again"
        elif name == "verifier_key":
            if value and "PRIVATE KEY-----" not in value:
                yield key, "must be a private key in PEM, in three double quotes"
        elif value and not HEADER_VALUE.fullmatch(value):
            yield key, "must be one line of ASCII without blanks"


def _check_verifier(verifier: VerifierSettings, secrets: SecretsTable, file: Path) -> Iterator[FieldProblem]:
    """Yield what the service would refuse: it would end, on a board that has neither screen nor network yet.

    Args:
        file: stands for those that the secrets become.
    """
    with_secrets = msgspec.structs.replace(
        verifier,
        token_file=file if secrets.verifier_token else verifier.token_file,
        key_file=file if secrets.verifier_key else verifier.key_file,
    )
    try:
        check_verifier_settings(with_secrets)
    except InputError as error:
        yield ("verifier",), f"verifier: {error}"


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except binascii.Error:
        return False
