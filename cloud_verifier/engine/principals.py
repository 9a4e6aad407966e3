"""The token file of a verifier: principals, their roles and their limits.

A principal is known by the SHA-256 hash of its token. The file is TOML with one table per principal. It is written by
`cloud-verifier token` and may be edited by hand:

    [kitchen]
    sha256 = "..."              # hash of the token; the token itself is stored nowhere
    role = "board"              # board: sessions; monitor: reads /metrics; admin: everything
    max_sessions = 8            # without this line there is no limit; `token add` writes all three
    tokens_per_second = 50.0
    max_prompt = 4096

A token has 192 random bits, so a plain SHA-256 reveals nothing about it. Lookups and comparisons use the hash, so their
timing reveals nothing about any token.

This module must import without torch: `cloud-verifier token` runs on the base install.
"""

from __future__ import annotations

import enum
import hashlib
import re
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from edge_runtime.protocol.errors import InputError

# Random bytes of a token: 192 bits.
TOKEN_BYTES = 24
# Limits that `cloud-verifier token add` gives unless told otherwise. Chosen: a household with a few boards does not
# reach them (each answer of a board has a session, and people read some tens of tokens per second), and a GPU bears
# dozens of those.
DEFAULT_MAX_SESSIONS = 16
DEFAULT_TOKENS_PER_SECOND = 200.0
DEFAULT_MAX_PROMPT = 32_768
PRINCIPAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Role(enum.StrEnum):
    """What a principal may do. An admin may do everything."""

    BOARD = "board"
    MONITOR = "monitor"
    ADMIN = "admin"


class Principal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The holder of a token.

    Attributes:
        sha256: hash of the token, in hexadecimal.
        role: what the holder may do.
        max_sessions: concurrent sessions; opening one more closes the least recently used one.
        tokens_per_second: long-run rate of generated tokens.
        max_prompt: longest prompt in tokens. A lost session may be reopened with a longer one, since that includes the
            answer so far.
        name: name of the table in the token file.
    """

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    role: Role = Role.BOARD
    max_sessions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    tokens_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_prompt: Annotated[int, msgspec.Meta(ge=1)] | None = None
    name: str = ""

    def describe_limits(self) -> str:
        """The limits in words."""
        limits = (
            (self.max_sessions, "sessions"),
            (self.tokens_per_second, "tokens per second"),
            (self.max_prompt, "prompt tokens"),
        )
        named = [f"{limit:g} {unit}" if limit < 1e6 else f"{limit} {unit}" for limit, unit in limits if limit]
        return ", ".join(named) or "no limits"


# The principal of every request to a verifier that has no token file.
ANONYMOUS = Principal("")


def new_token() -> str:
    """Generate a random token."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def hash_token(token: str) -> str:
    """Return the hash under which a token is stored."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def check_name(name: str) -> str:
    """Return `name`. Raises InputError if it is not a valid name of a principal."""
    if not PRINCIPAL_NAME.fullmatch(name):
        raise InputError(
            f"{name[:80]!r} is not a valid name of a principal; use letters, digits, _ . and -, at most 64 characters"
        )
    return name


def read_principals(path: Path) -> dict[str, Principal]:
    """Read a token file and return its principals by name.

    Raises:
        InputError: the file cannot be read, is not TOML, or has an invalid table or a duplicate token.
    """
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read the token file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    principals: dict[str, Principal] = {}
    name_by_hash: dict[str, str] = {}
    for name, table in tables.items():
        try:
            check_name(name)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        try:
            principal = msgspec.convert(table, Principal)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}, [{name}]: {error}") from None
        holder = name_by_hash.setdefault(principal.sha256, name)
        if holder != name:
            raise InputError(f"{path}: {holder} and {name} have the same token; create another one for one of them")
        principals[name] = msgspec.structs.replace(principal, name=name)
    return principals
