"""`cloud-verifier token`: creates, lists and revokes the tokens of a verifier. Works on the base install."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud_verifier.engine.principals import DEFAULT_MAX_PROMPT, DEFAULT_MAX_SESSIONS, DEFAULT_TOKENS_PER_SECOND
from edge_runtime.common.options import add_action, add_flag, add_option
from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import InputError

if TYPE_CHECKING:
    import tomlkit

# The credential that the unit of `cloud-verifier service` loads.
DEFAULT_TOKEN_FILE = Path("/etc/credstore/flexspec.verifier-tokens")
DESCRIPTION = f"""\
Creates the tokens that boards, monitors and admins authenticate with, and maintains the token file of a verifier:
names, roles, limits, and hashes of the tokens. A token is printed once and stored nowhere. Its limits are finite unless
told otherwise, and printed on standard error.

A running verifier rereads the file at SIGHUP; the one of `cloud-verifier service`, whose file is
{DEFAULT_TOKEN_FILE}, when it is restarted. Sessions survive both.

examples:
  cloud-verifier token add lab --tokens tokens.toml --max-sessions 4 --tokens-per-second 50 --max-prompt 4096
  cloud-verifier token add operator --role admin --tokens tokens.toml
  cloud-verifier token list --tokens tokens.toml
  cloud-verifier token revoke lab --tokens tokens.toml
  cloud-verifier serve family/target-v1 --tokens tokens.toml
  sudo cloud-verifier token add kitchen > kitchen.token          # for the board's verifier.token_file
"""


def add_parser(commands: Any) -> None:
    """Add `token` to argparse's subparsers."""
    parser = commands.add_parser(
        "token",
        help="create, list and revoke the tokens of a verifier",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    file_options = argparse.ArgumentParser(add_help=False)
    add_option(file_options, "--tokens FILE", "token file", default=DEFAULT_TOKEN_FILE, type=Path)

    add = add_action(actions, "add", _add, "create a token and print it", parents=[file_options])
    add.add_argument("name", metavar="NAME", help="name of its holder, for logs and metrics")
    text = "board: sessions; monitor: reads /metrics; admin: everything"
    add_option(add, "--role", text, default="board", choices=["board", "monitor", "admin"])
    text = "concurrent sessions; `none` for no limit"
    add_option(add, "--max-sessions N", text, default=DEFAULT_MAX_SESSIONS, type=_limit(int))
    text = "long-run rate; `none` for no limit"
    add_option(add, "--tokens-per-second N", text, default=DEFAULT_TOKENS_PER_SECOND, type=_limit(float))
    text = "longest prompt; `none` for that of the target"
    add_option(add, "--max-prompt TOKENS", text, default=DEFAULT_MAX_PROMPT, type=_limit(int))
    add_flag(add, "--replace", "revoke the existing token of NAME")

    revoke = add_action(actions, "revoke", _revoke, "revoke a token", parents=[file_options])
    revoke.add_argument("name", metavar="NAME")
    listing = add_action(actions, "list", _list, "list the holders of tokens", parents=[file_options])
    add_flag(listing, "--json", "print one JSON object, by name")


def _limit(parse: Callable[[str], float]) -> Callable[[str], float | None]:
    """Parse a limit, or `none`, for argparse."""

    def limit(text: str) -> float | None:
        return None if text == "none" else parse(text)

    # argparse names the type in its errors.
    limit.__name__ = "limit"
    return limit


def _add(options: argparse.Namespace) -> int:
    import msgspec
    import tomlkit

    from cloud_verifier.engine.principals import Principal, check_name, hash_token, new_token

    check_name(options.name)
    token = new_token()
    # The limits are those of sessions, and a monitor opens none.
    names = () if options.role == "monitor" else ("max_sessions", "tokens_per_second", "max_prompt")
    limits = {name: getattr(options, name) for name in names}
    fields = {"sha256": hash_token(token), "role": options.role}
    fields |= {name: limit for name, limit in limits.items() if limit is not None}
    try:
        principal = msgspec.convert(fields, Principal)
    except msgspec.ValidationError as error:
        raise InputError(f"invalid limit: {error}") from None

    def add_table(document: tomlkit.TOMLDocument) -> None:
        if options.name in document and not options.replace:
            raise InputError(f"{options.name} already has a token; --replace revokes it and creates another one")
        table = tomlkit.table()
        table.update(fields)
        document[options.name] = table

    _edit_token_file(options.tokens, add_table)
    print_note(f"the token of {options.name} has the role {principal.role}; {principal.describe_limits()}")
    # Nothing else goes to standard output, so that it can be redirected to a file.
    print(token)
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from cloud_verifier.engine.principals import read_principals

    if options.name not in read_principals(options.tokens):
        raise InputError(f"{options.tokens} has no token of {options.name!r}; see `cloud-verifier token list`")
    _edit_token_file(options.tokens, lambda document: document.pop(options.name, None))
    print_note(f"the token of {options.name} is revoked")
    return 0


def _list(options: argparse.Namespace) -> int:
    import msgspec

    from cloud_verifier.engine.principals import Principal, read_principals

    principals = read_principals(options.tokens)
    if options.json:
        fields = [field for field in Principal.__struct_fields__ if field not in ("sha256", "name")]
        listed = {
            name: {field: value for field in fields if (value := getattr(principal, field)) is not None}
            for name, principal in principals.items()
        }
        print(msgspec.json.encode(listed).decode())
        return 0
    for name, principal in principals.items():
        print(f"{name:24} {principal.role:8} {principal.describe_limits()}")
    return 0


def _edit_token_file(path: Path, edit: Callable[[tomlkit.TOMLDocument], object]) -> None:
    """Edit the file atomically, preserving its comments. Raises InputError."""
    import tomlkit

    from cloud_verifier.engine.principals import read_principals
    from edge_runtime.common.files import lock_directory, write_atomically

    try:
        with lock_directory(path.parent):
            if path.exists():
                # Refuse to edit an invalid file.
                read_principals(path)
                document = tomlkit.parse(path.read_text(encoding="utf-8"))
            else:
                document = tomlkit.document()
            edit(document)
            write_atomically(path, tomlkit.dumps(document).encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from None
