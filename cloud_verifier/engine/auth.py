"""Who may use a verifier: principals, known by the hashes of their tokens, each with a role and limits of their own.

The file is TOML, a table for each principal, made by `cloud-verifier token` and yours to edit:

    [kitchen]
    sha256 = "..."              # of the token, which is nowhere
    role = "board"              # sessions; "monitor" reads /metrics; "admin" may do everything
    max_sessions = 8            # all limits may be missing: then there is none
    tokens_per_second = 50.0
    max_prompt = 4096

A token is 192 random bits, so a plain SHA-256 of it says nothing about it; and hashes are what is looked up and
compared, so how long that takes says nothing about any token.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.requests import Request

from edge_runtime.protocol.errors import InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

TOKEN_BYTES = 24
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Role(enum.StrEnum):
    """What a principal may do."""

    BOARD = "board"
    MONITOR = "monitor"
    ADMIN = "admin"


class Principal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Somebody, or some board, that is known here.

    Attributes:
        sha256: of the token, in hexadecimal.
        role: what it may do.
        max_sessions: at once; with one more, the one that was used least recently is closed.
        tokens_per_second: that it is told in the long run.
        max_prompt: tokens of a prompt; a text that goes on after its session was lost may be longer, by its answer.
        name: of the table in the file.
    """

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    role: Role = Role.BOARD
    max_sessions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    tokens_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_prompt: Annotated[int, msgspec.Meta(ge=1)] | None = None
    name: str = ""


# Whoever comes, where nobody is asked for a token.
ANYBODY = Principal("")


class Doors:
    """Decides by a request's bearer token. Without a file everybody is a board, and nobody an admin.

    Attributes:
        file: of the principals; None where nobody is asked.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Raises InputError: see `read_principals`."""
        self.file = file
        self._by_hash: dict[str, Principal] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._by_hash)

    def reload(self) -> None:
        """Reads the file again. Raises InputError, and then everything stays as it was."""
        if self.file is not None:
            self._by_hash = {principal.sha256: principal for principal in read_principals(self.file).values()}

    def admit(self, request: Request, *roles: Role) -> Principal:
        """Who it is.

        Args:
            roles: of which one is needed, or that of an admin.

        Raises:
            VerifierRefused: `unauthorized` or `forbidden`.
        """
        if self.file is None:
            if Role.BOARD in roles or Role.MONITOR in roles:
                return ANYBODY
            raise VerifierRefused(
                ErrorCode.FORBIDDEN, "this verifier has no admins: start it with --tokens to have some", 403
            )
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = hash_of(token.strip())
        principal = self._by_hash.get(digest)
        if scheme.lower() != "bearer" or principal is None or not hmac.compare_digest(principal.sha256, digest):
            raise VerifierRefused(
                ErrorCode.UNAUTHORIZED,
                "this verifier wants a token that it knows (Authorization: Bearer TOKEN); its operator makes one with "
                "`cloud-verifier token add`",
                401,
            )
        if principal.role not in (*roles, Role.ADMIN):
            raise VerifierRefused(
                ErrorCode.FORBIDDEN,
                f"the token of {principal.name} is a {principal.role}'s, and this takes a {' or '.join(roles)}'s",
                403,
            )
        return principal


def require_admin(request: Request) -> Principal:
    """The admin whose request it is. Raises VerifierRefused: `unauthorized` or `forbidden`."""
    doors: Doors = request.app.state.doors
    return doors.admit(request, Role.ADMIN)


def new_token() -> str:
    """A token that nobody has had."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def hash_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def read_principals(path: Path) -> dict[str, Principal]:
    """Principals by name. Raises InputError: the file cannot be read, or says what it cannot mean."""
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read the tokens in {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    principals: dict[str, Principal] = {}
    holders: dict[str, str] = {}
    for name, table in tables.items():
        try:
            check_name(name)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        try:
            principal = msgspec.convert(table, Principal)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}, [{name}]: {error}") from None
        twin = holders.setdefault(principal.sha256, name)
        if twin != name:
            raise InputError(f"{path}: {twin} and {name} have the same token; make another for one of them")
        principals[name] = msgspec.structs.replace(principal, name=name)
    return principals


def check_name(name: str) -> str:
    """`name` itself. Raises InputError if nobody may be called that."""
    if not NAME.fullmatch(name):
        raise InputError(f"{name[:80]!r} is no name for a principal; use letters, digits, _ . and -, at most 64")
    return name
