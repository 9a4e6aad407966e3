"""How a service is, as systemd sees it."""

from __future__ import annotations

import contextlib
import datetime

import msgspec

from edge_runtime.systemd.units import systemctl

PROPERTIES = {
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "StatusText",
    "MainPID",
    "MemoryCurrent",
    "NRestarts",
    "StateChangeTimestamp",
    "Result",
}
# As `systemctl status` ends.
ACTIVE, NOT_RUNNING = 0, 3


class State(msgspec.Struct, frozen=True):
    """One service.

    Attributes:
        name: of its unit.
        installed: whether there is such a unit.
        state: `active`, `reloading`, `inactive`, `failed`, `activating` or `deactivating`.
        detail: the same more closely, such as `running` or `auto-restart`.
        enabled: whether it starts with the machine.
        text: what it says of itself.
        pid: of its main process; 0 for none.
        memory_bytes: its memory, or its main process's where the kernel does not account for services; None for none.
        restarts: how often systemd has started it again.
        since: when it came into this state; None if it never was in another.
        result: why it ended, `success` while all is well.
    """

    name: str
    installed: bool
    state: str
    detail: str
    enabled: bool
    text: str
    pid: int
    memory_bytes: int | None
    restarts: int
    since: datetime.datetime | None
    result: str

    @property
    def code(self) -> int:
        """The exit code that says whether it runs."""
        return ACTIVE if self.state in ("active", "reloading") else NOT_RUNNING


def read_state(name: str) -> State:
    """The state of the unit `name`. Raises ServiceError: systemd does not answer."""
    said = systemctl("show", f"{name}.service", "--timestamp=unix", f"--property={','.join(sorted(PROPERTIES))}")
    shown = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    pid = int(shown.get("MainPID") or 0)
    memory = shown.get("MemoryCurrent", "")
    changed = shown.get("StateChangeTimestamp", "").removeprefix("@")
    return State(
        name=name,
        installed=shown.get("LoadState") != "not-found",
        state=shown.get("ActiveState", "unknown"),
        detail=shown.get("SubState", ""),
        enabled=shown.get("UnitFileState") == "enabled",
        text=shown.get("StatusText", ""),
        pid=pid,
        memory_bytes=int(memory) if memory.isdecimal() and int(memory) < 1 << 63 else _resident(pid),
        restarts=int(shown.get("NRestarts") or 0),
        since=datetime.datetime.fromtimestamp(int(changed)).astimezone() if changed.isdecimal() else None,
        result=shown.get("Result", ""),
    )


def lines(state: State) -> list[str]:
    """For people."""
    if not state.installed:
        return [f"{state.name}: not installed"]
    since = f" since {state.since:%Y-%m-%d %H:%M:%S}" if state.since else ""
    result = f", {state.result}" if state.result not in ("", "success") else ""
    facts = [
        f"{'starts' if state.enabled else 'does not start'} with the machine",
        *([f"process {state.pid}"] if state.pid else []),
        *([f"{state.memory_bytes / 1e6:.0f} MB"] if state.memory_bytes is not None else []),
        f"{state.restarts} restarts",
    ]
    said = [f"  {state.text}"] if state.text else []
    return [f"{state.name}: {state.state} ({state.detail}{result}){since}", *said, f"  {', '.join(facts)}"]


def _resident(pid: int) -> int | None:
    import psutil

    if not pid:
        return None
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None
