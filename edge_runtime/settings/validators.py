"""Values of a configuration: from what TOML or the environment says to what a field holds, or why not.

A field's type says what it takes, and the `refine` in its `msgspec.Meta(extra=...)` does what types cannot: it gets a
value of the right type and the folder where relative paths start, and returns the value to hold. Everything here raises
InputError, whose message goes behind the field's name.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import inspect

from edge_runtime.protocol.errors import InputError

# Longest piece of a wrong value that a message repeats.
SHOWN = 40
LONGEST_SECRET = 16384
SCALARS: dict[type[inspect.Type], Any] = {inspect.BoolType: bool, inspect.IntType: int, inspect.FloatType: float}


def convert(value: Any, kind: Any, folder: Path) -> Any:
    """`value`, as TOML has it, as a value of the type `kind`.

    Raises:
        InputError: it is of another type, out of range, or `refine` says no.
    """
    try:
        converted = msgspec.convert(value, kind, dec_hook=_custom)
    except msgspec.ValidationError:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        raise InputError(
            f"must be {expected(kind)}, and is {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}"
        ) from None
    for meta in getattr(kind, "__metadata__", ()):
        if meta.extra is not None:
            converted = meta.extra["refine"](converted, folder)
    return converted


def from_text(text: str, kind: Any) -> Any:
    """What the variable's `text` would be in TOML, for a field of the type `kind`; itself where it is no such thing."""
    info = _bare(kind)
    if isinstance(info, inspect.ListType):
        return [part.strip() for part in text.split(",") if part.strip()]
    if type(info) in SCALARS:
        try:
            return msgspec.convert(text.strip(), SCALARS[type(info)], strict=False)
        except msgspec.ValidationError:
            return text
    return text


def expected(kind: Any) -> str:
    """What a field of the type `kind` takes, in words."""
    match _bare(kind):
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=least, le=most):
            return f"a whole number from {least} to {most}"
        case inspect.FloatType(gt=least, le=most):
            return f"a number above {least:g} and at most {most:g}"
        case inspect.ListType():
            return "a list of at least one string"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(json.dumps, values))}"
        case inspect.CustomType():
            return "a path, in quotes"
        case _:
            return "a string, in quotes"


def path(value: Path, folder: Path) -> Path:
    """A path that need not exist."""
    try:
        return folder / value.expanduser()
    except RuntimeError:
        raise InputError(f"{value}: nobody has that home; write the whole path") from None


def directory(value: Path, folder: Path) -> Path:
    """A directory that exists."""
    place = path(value, folder)
    with _reading(place):
        is_there = place.is_dir()
    if not is_there:
        raise InputError(f"there is no directory {place}; create it, or correct the path")
    return place


def file(value: Path, folder: Path) -> Path:
    """A file that can be read."""
    place = path(value, folder)
    _read(place)
    return place


def secret_file(value: Path, folder: Path) -> Path:
    """A file that holds a secret."""
    place = path(value, folder)
    with _reading(place):
        is_there = place.is_file()
    if not is_there:
        # Its name is not repeated: this happens to those who write the secret itself.
        raise InputError("the file that it names does not exist; name a file, and put the secret into it")
    read_secret(place)
    return place


def read_secret(place: Path) -> str:
    """The secret in the file at `place`, without the white space around it.

    Raises:
        InputError: the file cannot be read, or does not hold one line of printable ASCII, as HTTP headers need.
    """
    secret = _read(place, LONGEST_SECRET + 1).strip()
    if not secret or len(secret) > LONGEST_SECRET or not re.fullmatch(rb"[\x21-\x7e]+", secret):
        raise InputError(f"{place} must hold the secret and nothing else: one line of ASCII without blanks")
    return secret.decode("ascii")


def authorities(value: Path, folder: Path) -> Path:
    """A PEM file of certificates."""
    import ssl

    place = path(value, folder)
    _read(place)
    try:
        ssl.create_default_context(cafile=str(place))
    except ssl.SSLError:
        raise InputError(f"{place} holds no certificate; give the authority's in PEM, as -----BEGIN CERTI...") from None
    return place


def urls(values: list[str], folder: Path) -> list[str]:
    """URLs of verifiers, without the slash at their end."""
    for url in values:
        try:
            parts = urlsplit(url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fine = False
        if not fine or re.search(r"\s", url):
            raise InputError(f"{_without_password(url)!r} is not a URL; write for instance https://verifier.example")
        if parts.username is not None or parts.password is not None:
            raise InputError(f"{_without_password(url)!r} holds a user or password; use verifier.token_file instead")
        if parts.query or parts.fragment:
            raise InputError(f"{url!r} goes on behind its path; end it there")
    return [url.rstrip("/") for url in values]


def policy(value: str, folder: Path) -> str:
    """Name of a policy."""
    from edge_runtime.planning.factory import NAMES

    if value not in NAMES:
        raise InputError(f"{value!r} is no policy; there are {', '.join(NAMES)}")
    return value


def objective(value: str, folder: Path) -> str:
    """A planner's objective."""
    from edge_runtime.planning.objective import parse_objective

    parse_objective(value)
    return value


def profile(value: str, folder: Path) -> str:
    """Name of a shipped profile, or path of one; empty for none."""
    from edge_runtime.planning.board_profile import find_profile

    if not value:
        return value
    name = str(path(Path(value), folder)) if value.endswith(".toml") else value
    find_profile(name)
    return name


def energy_budget(value: str, folder: Path) -> str:
    """An energy budget; empty for none."""
    from edge_runtime.planning.energy_budget import parse_budget

    if value:
        parse_budget(value, datetime.datetime.now().astimezone(), 0.0)
    return value


def host(value: str, folder: Path) -> str:
    """An address or a host name to listen on."""
    if not re.fullmatch(r"[0-9A-Za-z_.:%-]+", value):
        raise InputError(f"{value!r} is neither an address nor a name; write for instance 127.0.0.1")
    return value


def is_loopback(name: str) -> bool:
    """Whether `name` is this machine and nobody else's."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def is_in_clear(url: str) -> bool:
    """Whether people on the way can read what goes to `url`; false also for what is no http URL."""
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and not is_loopback(parts.hostname or "")
    except ValueError:
        return False


def _read(place: Path, most: int = 1) -> bytes:
    """The first bytes of a file. Raises InputError."""
    with _reading(place), place.open("rb") as opened:
        return opened.read(most)


@contextlib.contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Makes what the system says of a path an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {place}: {error.strerror}; correct the path, or its permissions") from None
    except ValueError as error:
        raise InputError(f"{str(place)!r} is no path: {error}") from None


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url)


def _custom(kind: type, value: Any) -> Path:
    """What msgspec asks for types that it does not know, which is `Path` alone."""
    if not isinstance(value, str) or not value:
        raise ValueError("not a path")
    return Path(value)


def _bare(kind: Any) -> inspect.Type:
    """The type without its metadata, and without None."""
    info = inspect.type_info(kind)
    while isinstance(info, inspect.Metadata):
        info = info.type
    if isinstance(info, inspect.UnionType):
        return next(part for part in info.types if not isinstance(part, inspect.NoneType))
    return info
