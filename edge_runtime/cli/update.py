"""`edge-runtime update`: install a new version of the program on a board, or return to the previous one."""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

from edge_runtime.common.options import add_action, add_flag, add_option

HELP = "update the program on a board, with automatic return to the previous version"
DESCRIPTION = """\
Updates the program on a board that was set up by `device-profile image`: the new version is unpacked beside the one in
use, checked (signature, if a key is configured; checksum), and started. If it is not ready within its deadline, or
fails while it is watched, the previous version is started again; a power cut has the same effect. The draft bundle, the
configuration and all state stay where they are.

examples:
  sudo edge-runtime update install flexspec-0.2.0-aarch64.update --key /etc/flexspec/maker.pub
  edge-runtime update status
  sudo edge-runtime update rollback
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    add_option(shared, "--name NAME", "name of the service's unit", default="flexspec-edge")

    install = add_action(actions, "install", _install, "install an update, and watch it", parents=[shared])
    install.add_argument("archive", type=Path, metavar="FILE", help="the update, as `make release` writes it")
    install.add_argument(
        "--key", type=Path, metavar="FILE", help="public keys, one of which must have signed it (default: the bundles')"
    )
    add_option(install, "--watch SECONDS", "how long it must run without a fault after it is ready", default=30.0)
    status = add_action(actions, "status", _status, "print the versions on this board")
    add_flag(status, "--json", "print one JSON object")
    add_action(actions, "rollback", _rollback, "use the other version", parents=[shared])


async def _install(options: argparse.Namespace) -> int:
    from edge_runtime.protocol.errors import InputError
    from edge_runtime.settings.loading import read_settings
    from edge_runtime.systemd.unit_state import read_unit_state
    from edge_runtime.updates.slots import Slots

    # Now, as everything that `restart` imports: while it runs, modules would come from the new version.
    if not read_unit_state(options.name).installed:
        raise InputError(f"there is no service {options.name} to update; name its unit with --name")
    key = options.key or read_settings().draft.public_key_file
    # asyncio delivers ^C to tasks that await, and none does here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    version = Slots().install(options.archive, key, lambda: restart(options.name, options.watch))
    print(f"version {version} is in use")
    return 0


async def _status(options: argparse.Namespace) -> int:
    import msgspec

    from edge_runtime.updates.slots import Slots

    state = Slots().status()
    if options.json:
        print(msgspec.json.encode(state).decode())
        return 0
    print(f"{state.active}: {state.version}, in use{', on trial' if state.on_trial else ''}")
    if state.other:
        print(f"previous: {state.other}; `edge-runtime update rollback` returns to it")
    return 0


async def _rollback(options: argparse.Namespace) -> int:
    from edge_runtime.updates.slots import Slots

    version = Slots().rollback()
    restart(options.name, 0.0)
    print(f"{version} is in use")
    return 0


def restart(name: str, watch_seconds: float) -> None:
    """Restart a service, and watch it. Raises ServiceError: it was not ready in time, or failed later."""
    from edge_runtime.systemd.unit_state import read_unit_state
    from edge_runtime.systemd.units import ServiceError, systemctl

    unit = f"{name}.service"
    # If earlier failures have used up the start limit, systemd would refuse to start it.
    systemctl("reset-failed", unit, check=False)
    # Returns when the service has said that it is ready, or its TimeoutStartSec= has passed.
    systemctl("restart", unit)
    restarts = read_unit_state(name).restarts
    deadline = time.monotonic() + watch_seconds
    while time.monotonic() < deadline:
        state = read_unit_state(name)
        if state.state not in ("active", "reloading") or state.restarts != restarts:
            raise ServiceError(f"{name} failed after it had started: {state.result}")
        time.sleep(0.5)
