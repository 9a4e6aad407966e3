"""Validators: convert a value from TOML or the environment to the type of its setting, or explain why it is wrong.

`convert` checks types and ranges, from the setting's annotation. The other functions are the `validate` of a
`SettingSpec`: each takes a value of the right type and the directory that relative paths start at, and returns the
value to store. They raise InputError; its message is written to follow the setting's name.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import inspect

from edge_runtime.common.files import os_errors_as_input_errors
from edge_runtime.common.network import check_ca_file, hide_password, is_address, is_http_url, is_loopback
from edge_runtime.protocol.errors import InputError

# Chosen: a message repeats this much of a wrong value.
MAX_QUOTED_CHARACTERS = 40
# Chosen: more than any token needs; a larger file was named by mistake.
MAX_SECRET_BYTES = 16384
# Chosen: more than the keys of all who could use one board.
MAX_KEYS_BYTES = 1 << 20
SCALAR_TYPES: dict[type[inspect.Type], Any] = {inspect.BoolType: bool, inspect.IntType: int, inspect.FloatType: float}


def convert(value: Any, annotation: Any) -> Any:
    """Convert a TOML value to the annotated type. Raises InputError: wrong type or out of range."""
    try:
        return msgspec.convert(value, annotation, dec_hook=_decode_path)
    except msgspec.ValidationError:
        text = json.dumps(value, ensure_ascii=False, default=str)
        if len(text) > MAX_QUOTED_CHARACTERS:
            text = f"{text[:MAX_QUOTED_CHARACTERS]}..."
        raise InputError(f"must be {describe_type(annotation)}, and is {text}") from None


def from_text(text: str, annotation: Any) -> Any:
    """Return the TOML value that the text of an environment variable stands for; the text itself if there is none."""
    info = bare_type(annotation)
    if isinstance(info, inspect.ListType):
        return [part.strip() for part in text.split(",") if part.strip()]
    if type(info) in SCALAR_TYPES:
        try:
            return msgspec.convert(text.strip(), SCALAR_TYPES[type(info)], strict=False)
        except msgspec.ValidationError:
            return text
    return text


def describe_type(annotation: Any) -> str:
    """Return the values that an annotated type allows, in words."""
    match bare_type(annotation):
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=low, le=high):
            return f"a whole number from {low} to {high}"
        case inspect.FloatType(gt=low, le=high):
            return f"a number above {low:g} and at most {high:g}"
        case inspect.ListType(min_length=minimum):
            return "a list of at least one string" if minimum else "a list of strings"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(json.dumps, values))}"
        case inspect.CustomType():
            return "a path, in quotes"
        case _:
            return "a string, in quotes"


def bare_type(annotation: Any) -> inspect.Type:
    """Return the type without its metadata and without None."""
    info = inspect.type_info(annotation)
    while isinstance(info, inspect.Metadata):
        info = info.type
    if isinstance(info, inspect.UnionType):
        return next(member for member in info.types if not isinstance(member, inspect.NoneType))
    return info


def path(value: Path, folder: Path) -> Path:
    """Accept a path that need not exist; make it absolute."""
    try:
        return folder / value.expanduser()
    except RuntimeError:
        raise InputError(f"{value}: there is no such user; write the absolute path") from None


def directory(value: Path, folder: Path) -> Path:
    """Accept a directory that exists."""
    absolute = path(value, folder)
    if not _examine(absolute, Path.is_dir):
        raise InputError(f"there is no directory {absolute}; create it, or correct the path")
    return absolute


def file(value: Path, folder: Path) -> Path:
    """Accept a readable file."""
    absolute = path(value, folder)
    _read(absolute)
    return absolute


def secret_file(value: Path, folder: Path) -> Path:
    """Accept a file that holds a secret."""
    absolute = _existing_secret(value, folder)
    read_secret(absolute)
    return absolute


def api_key_file(value: Path, folder: Path) -> Path:
    """Accept a file of API keys."""
    absolute = _existing_secret(value, folder)
    read_api_keys(absolute)
    return absolute


def read_secret(source: Path) -> str:
    """Read a secret from a file, without surrounding white space.

    Raises:
        InputError: the file cannot be read, or is not one line of printable ASCII, as HTTP headers require.
    """
    secret = _read(source, MAX_SECRET_BYTES + 1).strip()
    if not secret or len(secret) > MAX_SECRET_BYTES or not re.fullmatch(rb"[\x21-\x7e]+", secret):
        raise InputError(f"{source} must hold the secret and nothing else: one line of ASCII without blanks")
    return secret.decode("ascii")


def read_api_keys(source: Path) -> frozenset[str]:
    """Read API keys, one per line; blank lines and lines that begin with # are skipped.

    Raises:
        InputError: the file cannot be read, has no key, or one that no HTTP header can hold.
    """
    content = _read(source, MAX_KEYS_BYTES + 1)
    lines = [line.strip() for line in content.splitlines()]
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise InputError(f"{source} has no API key: write one per line")
    if len(content) > MAX_KEYS_BYTES or not all(re.fullmatch(rb"[\x21-\x7e]+", key) for key in keys):
        raise InputError(f"{source} must hold API keys and nothing else: each a line of ASCII without blanks")
    return frozenset(key.decode("ascii") for key in keys)


def authorities(value: Path, folder: Path) -> Path:
    """Accept a PEM file of certificates."""
    return check_ca_file(path(value, folder))


def urls(values: list[str], folder: Path) -> list[str]:
    """Accept base URLs of verifiers; remove trailing slashes."""
    for url in values:
        if not is_http_url(url):
            raise InputError(f"{hide_password(url)!r} is not a URL; write for instance https://verifier.example")
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise InputError(f"{hide_password(url)!r} holds a user or password; use verifier.token_file instead")
        if parts.query or parts.fragment:
            raise InputError(f"{url!r} has a query or fragment; end the URL after its path")
    return [url.rstrip("/") for url in values]


def objective(value: str, folder: Path) -> str:
    """Accept an objective of the planner."""
    from edge_runtime.planning.objective import parse_objective

    parse_objective(value)
    return value


def profile(value: str, folder: Path) -> str:
    """Accept the name of a shipped device profile, or the path of one, which becomes absolute; empty for none."""
    from edge_runtime.planning.board_profile import find_profile

    if not value:
        return value
    name = str(path(Path(value), folder)) if value.endswith(".toml") else value
    find_profile(name)
    return name


def energy_budget(value: str, folder: Path) -> str:
    """Accept an energy budget; empty for none."""
    from edge_runtime.planning.energy_budget import parse_energy_budget

    if value:
        parse_energy_budget(value, datetime.datetime.now().astimezone(), 0.0)
    return value


def host(value: str, folder: Path) -> str:
    """Accept an address or a host name to listen on."""
    numeric = re.fullmatch(r"[0-9.]+|.*:.*", value)
    if not re.fullmatch(r"[0-9A-Za-z_.:%-]+", value) or (numeric and not is_address(value)):
        raise InputError(f"{value!r} is neither an address nor a host name; write for instance 127.0.0.1")
    return value


def host_names(values: list[str], folder: Path) -> list[str]:
    """Accept names that a Host header may have, without port."""
    from edge_runtime.common.network import check_host_name

    return [check_host_name(value) for value in values]


def origins(values: list[str], folder: Path) -> list[str]:
    """Accept origins as browsers send them, and `*`."""
    for value in values:
        if value != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[0-9A-Za-z_.:\[\]-]+", value):
            raise InputError(f"{value!r} is not an origin; write for instance https://chat.example, without a path")
    return values


def proxy(value: str, folder: Path) -> str:
    """Accept the URL of an HTTP proxy; empty for none."""
    from edge_runtime.common.network import check_proxy

    if value:
        check_proxy(value)
    return value


def is_in_clear(url: str) -> bool:
    """Return whether data sent to this URL leaves the machine unencrypted; False if it is not an http URL at all."""
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and not is_loopback(parts.hostname or "")
    except ValueError:
        return False


def _existing_secret(value: Path, folder: Path) -> Path:
    absolute = path(value, folder)
    if not _examine(absolute, Path.is_file):
        # The message does not repeat the value: it may be the secret itself, written here by mistake.
        raise InputError("the file that it names does not exist; name a file, and put the secret into it")
    return absolute


def _examine(source: Path, test: Callable[[Path], bool]) -> bool:
    with os_errors_as_input_errors(source):
        return test(source)


def _read(source: Path, max_bytes: int = 1) -> bytes:
    with os_errors_as_input_errors(source), source.open("rb") as opened:
        return opened.read(max_bytes)


def _decode_path(kind: type, value: Any) -> Path:
    # msgspec calls this for every type that it does not know itself, which here is Path alone.
    if not isinstance(value, str) or not value:
        raise ValueError("not a path")
    return Path(value)
