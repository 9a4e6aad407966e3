"""`cloud-verifier token`: who may use a verifier."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge_runtime.protocol.errors import InputError

# Where the service of `cloud-verifier service` finds it, as a credential.
DEFAULT_FILE = Path("/etc/credstore/flexspec.verifier-tokens")
DESCRIPTION = f"""\
Makes the tokens that boards, monitors and admins show to a verifier, and keeps the file that says whom they belong to:
names, roles, limits, and the tokens' hashes. A token is printed once, and is nowhere else.

A verifier that runs takes notice when it gets SIGHUP; the one of `cloud-verifier service`, whose file is
{DEFAULT_FILE}, when it is restarted. Sessions outlive that.

examples:
  sudo cloud-verifier token add kitchen > kitchen.token          # for the board's verifier.token_file
  cloud-verifier token add lab --tokens tokens.toml --max-sessions 4 --tokens-per-second 50 --max-prompt 4096
  cloud-verifier token add operator --role admin --tokens tokens.toml
  cloud-verifier token list --tokens tokens.toml
  cloud-verifier token revoke lab --tokens tokens.toml
  cloud-verifier serve export/example_family/target-v1 --tokens tokens.toml
"""


def add_parser(commands: Any) -> None:
    """Adds `token` to argparse's sub-parsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("token", help="who may use a verifier", description=DESCRIPTION, formatter_class=raw)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--tokens", type=Path, default=DEFAULT_FILE, metavar="FILE", help="default: %(default)s")

    add = actions.add_parser("add", parents=[shared], help="make a token, and print it")
    add.add_argument("name", help="of whoever gets it, for logs and metrics")
    add.add_argument(
        "--role",
        default="board",
        choices=["board", "monitor", "admin"],
        help="a board may have sessions, a monitor read /metrics, an admin do everything (default: %(default)s)",
    )
    add.add_argument("--max-sessions", type=int, metavar="N", help="at once (default: no limit)")
    add.add_argument("--tokens-per-second", type=float, metavar="N", help="in the long run (default: no limit)")
    add.add_argument("--max-prompt", type=int, metavar="TOKENS", help="default: what the target takes")
    add.add_argument("--replace", action="store_true", help="the token that NAME has had, which ends it")
    add.set_defaults(run=_add)

    revoke = actions.add_parser("revoke", parents=[shared], help="end a token")
    revoke.add_argument("name")
    revoke.set_defaults(run=_revoke)

    shown = actions.add_parser("list", parents=[shared], help="who has a token")
    shown.add_argument("--json", action="store_true", help="print one JSON object by name")
    shown.set_defaults(run=_list)


def _add(options: argparse.Namespace) -> int:
    import msgspec
    import tomlkit

    from cloud_verifier.engine.auth import Principal, check_name, hash_of, new_token

    check_name(options.name)
    token = new_token()
    limits = {name: getattr(options, name) for name in ("max_sessions", "tokens_per_second", "max_prompt")}
    said = {"sha256": hash_of(token), "role": options.role} | {name: n for name, n in limits.items() if n is not None}
    try:
        msgspec.convert(said, Principal)
    except msgspec.ValidationError as error:
        raise InputError(f"a limit cannot be that: {error}") from None

    def change(document: tomlkit.TOMLDocument) -> None:
        if options.name in document and not options.replace:
            raise InputError(f"{options.name} has a token already: --replace makes another, and ends that one")
        table = tomlkit.table()
        table.update(said)
        document[options.name] = table

    _edit(options.tokens, change)
    # Alone on standard output, so that it can go to a file.
    print(token)
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from cloud_verifier.engine.auth import read_principals

    if options.name not in read_principals(options.tokens):
        raise InputError(f"nobody in {options.tokens} is called {options.name!r}; see `cloud-verifier token list`")
    _edit(options.tokens, lambda document: document.pop(options.name, None))
    print(f"{options.name} has no token any more", file=sys.stderr)
    return 0


def _list(options: argparse.Namespace) -> int:
    import msgspec

    from cloud_verifier.engine.auth import Principal, read_principals

    principals = read_principals(options.tokens)
    if options.json:
        fields = [field for field in Principal.__struct_fields__ if field not in ("sha256", "name")]
        shown = {
            name: {field: value for field in fields if (value := getattr(who, field)) is not None}
            for name, who in principals.items()
        }
        print(msgspec.json.encode(shown).decode())
        return 0
    for name, who in principals.items():
        limits = [
            f"{limit} {text}"
            for limit, text in (
                (who.max_sessions, "sessions"),
                (who.tokens_per_second, "tokens per second"),
                (who.max_prompt, "tokens of a prompt"),
            )
            if limit is not None
        ]
        print(f"{name:24} {who.role:8} {', '.join(limits) or 'no limits'}")
    return 0


def _edit(path: Path, change: Any) -> None:
    """Changes the file in one step, or not at all; comments stay. Raises InputError."""
    import tomlkit

    from cloud_verifier.engine.auth import read_principals
    from edge_runtime.common.files import locked, write_whole

    try:
        with locked(path.parent):
            if path.exists():
                # One with errors is not made worse.
                read_principals(path)
                document = tomlkit.parse(path.read_text(encoding="utf-8"))
            else:
                document = tomlkit.document()
            change(document)
            write_whole(path, tomlkit.dumps(document).encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from None
