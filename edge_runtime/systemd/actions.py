"""`edge-runtime service` and `cloud-verifier service`: install, remove and inspect the program's systemd service."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.terminal import print_note
from edge_runtime.systemd.units import ServiceUnit

BOARD_UNIT = ServiceUnit(
    module="edge_runtime.cli",
    name="flexspec-edge",
    state_directory="flexspec",
    template=Path(__file__).with_name("flexspec-edge.service"),
)
DESCRIPTION = """\
Runs the board's service under systemd: started at boot, watched, restarted after a fault, and with few privileges. It
reads /etc/flexspec/config.toml if that exists, and reloads it on `systemctl reload flexspec-edge`. Its bundle store is
/var/lib/flexspec/bundles. Secrets are files in /etc/credstore that only root can read: flexspec.verifier-token,
flexspec.verifier-key (of a client certificate) and flexspec.api-key. systemd reads them when the service starts, so a
new secret needs a restart.

examples:
  edge-runtime config check /etc/flexspec/config.toml
  edge-runtime bundle install draft.tar.gz --store /var/lib/flexspec/bundles
  edge-runtime service install --now
  edge-runtime service install --config /etc/flexspec/lab.toml --name flexspec-lab -- --port 8401
  edge-runtime service install --root /mnt/image --python /opt/flexspec/bin/python --now     # into an image
  edge-runtime service status --json   # exit code 0: running; 3: not running; 4: running, but no verifier answers
  journalctl -u flexspec-edge -f
  edge-runtime service uninstall
"""

# Options and arguments of `serve`, of board and verifier, that name files that must exist before it starts.
READ_PATHS = {"config", "draft.bundle", "target"}
# Parses arguments as the program itself does.
ArgumentsParser = Callable[[list[str]], argparse.Namespace]
# Raises InputError if `serve` would refuse these arguments.
ArgumentsCheck = Callable[[argparse.Namespace], None]


def add_parser(commands: Any, run: Callable[[argparse.Namespace], Any]) -> None:
    """Add the board's `service` to the subparsers; `run` calls `run_action`."""
    install = add_service_parser(commands, run, "run this board's service under systemd", DESCRIPTION, BOARD_UNIT)
    add_option(install, "--config FILE", "configuration file (default: see `edge-runtime config --help`)", type=Path)


def add_service_parser(
    commands: Any, run: Callable[[argparse.Namespace], Any], text: str, description: str, unit: ServiceUnit
) -> argparse.ArgumentParser:
    """Add `service` and its actions to the subparsers.

    Args:
        run: runs the command, by calling `run_action`.
        text: one line for the list of commands.

    Returns:
        The parser of `service install`.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "service", help=text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, service_unit=unit)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    add_option(shared, "--name NAME", f"name of the unit (default: {unit.name})")

    install = actions.add_parser("install", parents=[shared], help="write the unit; with --now, start it")
    add_flag(install, "--now", "start the service now and at every boot")
    add_option(install, "--python FILE", "Python interpreter of the service (default: the one in use)", type=Path)
    install.add_argument("serve", nargs="*", metavar="ARGUMENT", help="arguments of `serve`; options come after `--`")
    install.set_defaults(action=_install)

    uninstall = actions.add_parser(
        "uninstall", parents=[shared], help="stop the service and remove its unit, not its state"
    )
    uninstall.set_defaults(action=_uninstall)
    for action in (install, uninstall):
        add_option(action, "--root DIR", "root directory of an image to change (default: this machine)", type=Path)

    status = actions.add_parser(
        "status",
        parents=[shared],
        help="print the state, and exit with a code for it",
    )
    add_flag(status, "--json", "print one JSON object")
    status.set_defaults(action=_status)
    return install


def run_action(options: argparse.Namespace, parse: ArgumentsParser, check: ArgumentsCheck | None = None) -> int:
    """Run an action of `service`. Returns the exit code.

    Args:
        parse: the program's own parser, to check the arguments that the service will be started with.
        check: the program's further checks of these arguments on the machine that will run it.

    Raises:
        InputError: the options are wrong, or the user is not root.
        ServiceError: systemd reported an error.
    """
    from edge_runtime.systemd.units import validate_unit_name

    options.name = validate_unit_name(options.name or options.service_unit.name)
    code: int = options.action(options, parse, check)
    return code


def _install(options: argparse.Namespace, parse: ArgumentsParser, check: ArgumentsCheck | None) -> int:
    import sys

    from edge_runtime.protocol.errors import InputError
    from edge_runtime.systemd import image
    from edge_runtime.systemd.units import UnitManager, installation_paths, render_unit, validate_paths

    units, root = UnitManager(options.root), options.root
    arguments = list(options.serve)
    config: Path | None = getattr(options, "config", None)
    if config:
        arguments += ["--config", str(config)]
    # Parsing the arguments now reports an error that otherwise would only end the service later.
    served = parse(["serve", *arguments])
    named = _named_paths(served, arguments)
    validate_paths(path for _, path in named)
    python: Path = options.python or Path(sys.executable)
    if root is not None:
        python = image.choose_interpreter(root, options.python)
        image.check_files(root, [path for key, path in named if key in READ_PATHS])
    else:
        if options.python is None:
            validate_paths(installation_paths())
        if check is not None:
            check(served)
    if config and root is None and not config.stat().st_mode & 0o004:
        raise InputError(f"{config}: the service runs as its own user and cannot read it; run `chmod o+r` on it")
    text = render_unit(options.service_unit, options.name, python, arguments)
    changed = units.install(options.name, text, now=options.now)
    print(f"{units.path(options.name)}: {'written' if changed else 'unchanged'}")
    if options.service_unit is BOARD_UNIT:
        state = BOARD_UNIT.state_directory if options.name == BOARD_UNIT.name else options.name
        notes = (
            image.missing_for_board(root, config, dict(named).get("draft.bundle"), state) if root else memory_notes()
        )
        for note in notes:
            print_note(f"note: {note}")
    if not options.now:
        print(f"`systemctl enable --now {options.name}`, or --now here, starts it now and at every boot")
    return 0


def _named_paths(served: argparse.Namespace, arguments: list[str]) -> list[tuple[str, Path]]:
    """Return the paths that the arguments name, each after its destination, without those that are defaults."""
    named = {Path(word) for argument in arguments for word in (argument, argument.partition("=")[2]) if word}
    values = [
        (key, item) for key, value in vars(served).items() for item in (value if isinstance(value, list) else [value])
    ]
    return [(key, value) for key, value in values if isinstance(value, Path) and value in named]


def memory_notes() -> Iterator[str]:
    """Yield a sentence if the kernel does not account for the memory of services."""
    from edge_runtime.common.memory import SERVICE_SHARE, accounts_for_services

    if not accounts_for_services():
        yield (
            "this kernel does not account for memory (cgroup_disable=memory), so MemoryMax= of the unit is no limit; "
            f"the service bounds its own memory to {SERVICE_SHARE:.0%} of the machine's instead. Adding "
            "cgroup_enable=memory to the kernel command line (/boot/firmware/cmdline.txt) changes that"
        )


def _uninstall(options: argparse.Namespace, parse: ArgumentsParser, check: ArgumentsCheck | None) -> int:
    from edge_runtime.systemd.units import UnitManager

    units = UnitManager(options.root)
    removed = units.uninstall(options.name)
    print(f"{units.path(options.name)}: {'removed' if removed else 'not installed'}")
    return 0


def _status(options: argparse.Namespace, parse: ArgumentsParser, check: ArgumentsCheck | None) -> int:
    import msgspec

    from edge_runtime.systemd.unit_state import format_unit_state, read_unit_state

    state = read_unit_state(options.name)
    notes = list(memory_notes()) if options.service_unit is BOARD_UNIT and state.installed else []
    if options.json:
        print(msgspec.json.encode({**msgspec.to_builtins(state), "notes": notes}).decode())
    else:
        print("\n".join([*format_unit_state(state), *(f"  {note}" for note in notes)]))
    return state.exit_code
