"""`edge-runtime service` and `cloud-verifier service`: the program as a service of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.systemd.units import Kind

EDGE = Kind("edge_runtime.cli", "flexspec-edge", "flexspec", Path(__file__).with_name("flexspec-edge.service"))
DESCRIPTION = """\
Runs the board's service with systemd: from boot on, watched, started again after a fault, and with few rights. It reads
/etc/flexspec/config.toml if that exists, and again at `systemctl reload flexspec-edge`; its bundle store is
/var/lib/flexspec/bundles. Secrets are files that only root can read: flexspec.verifier-token, flexspec.verifier-key
(of a client certificate) and flexspec.api-key in /etc/credstore; systemd reads them when the service starts, so a new
one needs a restart.

examples:
  edge-runtime config check /etc/flexspec/config.toml
  edge-runtime bundle install draft.tar.gz --store /var/lib/flexspec/bundles
  edge-runtime service install --now
  edge-runtime service install --config /etc/flexspec/lab.toml --name flexspec-lab -- --port 8401
  edge-runtime service install --root /mnt/image --python /opt/flexspec/bin/python --now     # starts with the image
  edge-runtime service status --json            # exit code 0: it runs; 3: it does not
  journalctl -u flexspec-edge -f
  edge-runtime service uninstall
"""


def add_parser(commands: Any, run: Callable[[argparse.Namespace], Any]) -> None:
    """Adds `service` to the board's sub-parsers; `run` is what it runs."""
    install = add_actions(commands, run, "run this board's service with systemd", DESCRIPTION, EDGE)
    install.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration (default: as `edge-runtime config`)"
    )


def add_actions(
    commands: Any, run: Callable[[argparse.Namespace], Any], text: str, description: str, kind: Kind
) -> argparse.ArgumentParser:
    """Adds `service` and its actions to argparse's sub-parsers.

    Args:
        run: what the command runs, with `run_action`.

    Returns:
        The parser of `install`.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        "service", help=text, description=description, formatter_class=raw
    )
    parser.set_defaults(run=run, service_kind=kind)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--name", metavar="NAME", help=f"of the unit (default: {kind.name})")

    install = actions.add_parser("install", parents=[shared], help="write the unit, and with --now start it")
    install.add_argument("--now", action="store_true", help="start it now, and with the machine")
    install.add_argument("--python", type=Path, metavar="FILE", help="interpreter to run (default: this one)")
    install.add_argument(
        "serve",
        nargs="*",
        metavar="ARGUMENT",
        help="of `serve`; those that begin with a dash stand behind `--`",
    )
    install.set_defaults(action=_install)

    uninstall = actions.add_parser("uninstall", parents=[shared], help="stop and remove it; its state stays")
    uninstall.set_defaults(action=_uninstall)
    for action in (install, uninstall):
        action.add_argument("--root", type=Path, metavar="DIR", help="of an image, instead of this machine")

    status = actions.add_parser("status", parents=[shared], help="how it is; exit code 0 if it runs, 3 if not")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(action=_status)
    return install


def run_action(options: argparse.Namespace, parse: Callable[[list[str]], argparse.Namespace]) -> int:
    """Runs the command.

    Args:
        parse: the program's own parsing, for the arguments that the service is to be started with.

    Returns:
        The exit code.

    Raises:
        InputError: the options are wrong, or the user is not root.
        ServiceError: systemd did not do what it was asked.
    """
    from edge_runtime.systemd.units import check_name

    kind = options.service_kind
    name = check_name(options.name or kind.name)
    code: int = options.action(options, kind, name, parse)
    return code


Parse = Callable[[list[str]], argparse.Namespace]


def _install(options: argparse.Namespace, kind: Kind, name: str, parse: Parse) -> int:
    import sys

    from edge_runtime.systemd.units import Units, check_paths, installation, unit_text

    units = Units(options.root)
    arguments = list(options.serve)
    if config := getattr(options, "config", None):
        arguments += ["--config", str(config)]
        if options.root is None:
            _check_configuration(config)
    # What the service would not understand is better said now.
    check_paths(_paths(parse(["serve", *arguments]), arguments))
    if options.root is None and options.python is None:
        check_paths(installation())
    text = unit_text(kind, name, options.python or Path(sys.executable), arguments)
    changed = units.install(name, text, now=options.now)
    print(f"{units.path(name)}: {'written' if changed else 'as it was'}")
    if not options.now:
        print(f"`systemctl enable --now {name}` starts it, now and with the machine; so does --now here")
    return 0


def _paths(served: argparse.Namespace, arguments: list[str]) -> list[Path]:
    """The paths that the arguments name; not those that are the options' own defaults."""
    named = {Path(word) for argument in arguments for word in (argument, argument.partition("=")[2]) if word}
    values = [value for field in vars(served).values() for value in (field if isinstance(field, list) else [field])]
    return [value for value in values if isinstance(value, Path) and value in named]


def _check_configuration(path: Path) -> None:
    """Raises InputError unless the service, a user of its own, can read the file, and it has no errors."""
    from edge_runtime.protocol.errors import InputError
    from edge_runtime.settings.loading import read_effective

    read_effective(path, {})
    if not path.stat().st_mode & 0o004:
        raise InputError(f"{path}: the service is a user of its own and cannot read it; `chmod o+r` it")


def _uninstall(options: argparse.Namespace, kind: Kind, name: str, parse: Parse) -> int:
    from edge_runtime.systemd.units import Units

    units = Units(options.root)
    removed = units.uninstall(name)
    print(f"{units.path(name)}: {'removed' if removed else 'there is none'}")
    return 0


def _status(options: argparse.Namespace, kind: Kind, name: str, parse: Parse) -> int:
    import msgspec

    from edge_runtime.systemd.unit_state import lines, read_state

    state = read_state(name)
    print(msgspec.json.encode(state).decode() if options.json else "\n".join(lines(state)))
    return state.code
