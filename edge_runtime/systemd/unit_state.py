"""The state of a service, as systemd reports it."""

from __future__ import annotations

import contextlib
import datetime
import os

import msgspec

from edge_runtime.systemd.units import systemctl

PROPERTIES = (
    "ActiveState,LoadState,MainPID,MemoryCurrent,NRestarts,Result,StateChangeTimestamp,StatusErrno,StatusText,"
    "SubState,UnitFileState"
)
# The exit codes of `systemctl status`, and that of a verifier that cannot be reached (`protocol.errors.VerifierError`).
EXIT_ACTIVE, EXIT_NOT_RUNNING, EXIT_UNREACHABLE = 0, 3, 4


class UnitState(msgspec.Struct, frozen=True):
    """State of one service.

    Attributes:
        installed: whether the unit exists.
        state: `active`, `reloading`, `inactive`, `failed`, `activating` or `deactivating`.
        detail: systemd's sub-state, such as `running` or `auto-restart`.
        enabled: whether it starts at boot.
        text: its own status text.
        error: why it cannot do its work although it runs, for a board that its verifier cannot be reached; empty if
            it can. `text` says more.
        pid: process id of its main process; 0 if there is none.
        memory_bytes: memory of the service, or of its main process if the kernel does not account for services; None
            if it does not run.
        restarts: number of restarts by systemd.
        since: time of the last change of state; None if there was none.
        result: reason of the last failure, or `success`.
    """

    name: str
    installed: bool
    state: str
    detail: str
    enabled: bool
    text: str
    error: str
    pid: int
    memory_bytes: int | None
    restarts: int
    since: datetime.datetime | None
    result: str

    @property
    def exit_code(self) -> int:
        """Exit code of `service status`."""
        if self.state not in ("active", "reloading"):
            return EXIT_NOT_RUNNING
        return EXIT_UNREACHABLE if self.error else EXIT_ACTIVE


def read_unit_state(name: str) -> UnitState:
    """Read the state of the unit `name`. Raises ServiceError: systemd does not answer."""
    output = systemctl("show", f"{name}.service", "--timestamp=unix", f"--property={PROPERTIES}")
    properties = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    pid = int(properties.get("MainPID") or 0)
    memory = properties.get("MemoryCurrent", "")
    changed = properties.get("StateChangeTimestamp", "").removeprefix("@")
    return UnitState(
        name=name,
        installed=properties.get("LoadState") != "not-found",
        state=properties.get("ActiveState", "unknown"),
        detail=properties.get("SubState", ""),
        enabled=properties.get("UnitFileState") == "enabled",
        text=properties.get("StatusText", ""),
        error=os.strerror(number) if (number := int(properties.get("StatusErrno") or 0)) else "",
        pid=pid,
        memory_bytes=int(memory) if memory.isdecimal() and int(memory) < 1 << 63 else _read_resident_memory(pid),
        restarts=int(properties.get("NRestarts") or 0),
        since=datetime.datetime.fromtimestamp(int(changed)).astimezone() if changed.isdecimal() else None,
        result=properties.get("Result", ""),
    )


def format_unit_state(state: UnitState) -> list[str]:
    """Return lines for a terminal."""
    if not state.installed:
        return [f"{state.name}: not installed"]
    since = f" since {state.since:%Y-%m-%d %H:%M:%S}" if state.since else ""
    result = f", {state.result}" if state.result not in ("", "success") else ""
    details = [
        f"{'starts' if state.enabled else 'does not start'} at boot",
        *([f"process {state.pid}"] if state.pid else []),
        *([f"{state.memory_bytes / 1e6:.0f} MB"] if state.memory_bytes is not None else []),
        f"{state.restarts} restarts",
    ]
    text = [f"  {state.text}"] if state.text else []
    return [f"{state.name}: {state.state} ({state.detail}{result}){since}", *text, f"  {', '.join(details)}"]


def _read_resident_memory(pid: int) -> int | None:
    import psutil

    if not pid:
        return None
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None
