"""Board and verifier as services of a booted systemd, from installation to removal."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.edge_runtime.systemd.machine import SOURCE, Machine, booted

EDGE, VERIFIER = "flexspec-edge", "flexspec-verifier"
STORE = "/var/lib/flexspec/bundles"
# Contains a space, a specifier and a variable in the syntax of unit files.
CONFIG = "/etc/flexspec/my %n $HOME.toml"
PROMPT = "def unmistakable_prompt("
TOKEN, KEY = "token-of-the-verifier", "key-of-the-board"
# Only a limit for hangs.
TIMEOUT_SECONDS = 300.0


@pytest.mark.slow
def test_the_life_of_a_board_and_its_verifier_under_systemd(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:
        ports = [free_port() for _ in range(3)]
        board = Board(machine, *ports)
        check_start_without_a_draft(board)
        check_start(board)
        check_credentials(board)
        check_reload(board)
        check_watchdog(board)
        check_stop_and_uninstall(board)


class Board:
    """The service under test, its configuration, and its port to a recording relay to the verifier."""

    def __init__(self, machine: Machine, port: int, relay_port: int, verifier_port: int) -> None:
        self.machine = machine
        self.url = f"http://127.0.0.1:{port}"
        self.port, self.relay_port, self.verifier_port = port, relay_port, verifier_port
        etc = machine.root / "etc"
        (etc / "flexspec").mkdir()
        store = etc / "credstore"
        store.mkdir(mode=0o700)
        for name, secret in (("flexspec.verifier-token", TOKEN), ("flexspec.api-key", KEY)):
            (store / name).write_text(secret)
            (store / name).chmod(0o600)
        self.configure()

    def configure(self, **tables: str) -> None:
        """Write the configuration; `tables` adds lines to its tables."""
        common = {
            "verifier": f'urls = ["http://127.0.0.1:{self.relay_port}"]\nhttp2 = false',
            "service": f"port = {self.port}",
        }
        lines = [f"[{name}]\n{common.get(name, '')}\n{tables.get(name, '')}" for name in {**common, **tables}]
        (self.machine.root / CONFIG[1:]).write_text("\n".join(lines))

    def state(self) -> dict[str, object]:
        """Return the output of `edge-runtime service status --json`."""
        result = self.machine.edge("service", "status", "--json", check=False)
        state: dict[str, object] = json.loads(result.stdout)
        running = state["state"] in ("active", "reloading")
        assert result.returncode == (3 if not running else 4 if state["error"] else 0)
        return state

    def answer(self, key: str = KEY) -> httpx.Response:
        """Request a completion, the same every time."""
        request = {"model": "", "prompt": PROMPT, "max_tokens": 16, "temperature": 0.7, "seed": 1}
        return httpx.post(
            f"{self.url}/v1/completions",
            json=request,
            headers={"authorization": f"Bearer {key}"},
            timeout=TIMEOUT_SECONDS,
        )

    def text(self) -> str:
        response = self.answer()
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def reload(self, status: str) -> None:
        """Reload, and wait until the status text matches `status`."""
        self.machine.run("systemctl", "reload", EDGE)
        wait_until(lambda: re.search(status, str(self.state()["text"])))


def check_start_without_a_draft(board: Board) -> None:
    board.configure(draft='bundle = "/etc"')
    refused = board.machine.edge("service", "install", "--now", "--config", CONFIG, check=False)
    assert refused.returncode == 1 and f"restart {EDGE}.service` failed" in refused.stderr
    state = board.state()
    assert (state["installed"], state["state"], state["restarts"]) == (True, "failed", 0)
    assert board.machine.unit_property(EDGE, "ExecMainStatus") == "3"
    assert "no draft bundle at /etc" in board.machine.journal(EDGE)


def check_start(board: Board) -> None:
    machine = board.machine
    board.configure()
    machine.edge("bundle", "install", f"{SOURCE}/tests/toy_family/bundle", "--store", STORE)
    assert "unchanged" in machine.edge("service", "install", "--now", "--config", CONFIG).stdout
    # The unit is active as soon as the draft is loaded. The verifier does not run yet, and everything says so.
    assert httpx.get(f"{board.url}/healthz").status_code == 200
    wait_until(lambda: board.state()["error"])
    state = board.state()
    assert (state["state"], state["enabled"], state["error"]) == ("active", True, "Connection refused")
    assert re.search(r"^no verifier can be used since .*127\.0\.0\.1.*; no round yet, 0 answers$", str(state["text"]))
    refused = httpx.get(f"{board.url}/readyz")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "connection_refused")
    journal = machine.journal(EDGE)
    assert len(re.findall("no verifier can be used since", journal)) == 1
    # Where the kernel does not limit the service, as in a container on a host with the first version of cgroups, it
    # limits itself.
    accounted = machine.unit_property(EDGE, "MemoryCurrent").isdecimal()
    limit = re.search(r"Max data size +(\S+)", machine.run("cat", f"/proc/{state['pid']}/limits").stdout)
    assert limit and (limit[1] == "unlimited") is accounted
    assert ("bounded to" in journal) is not accounted
    assert bool(state["notes"]) is not accounted
    assert "credential" not in journal.lower()
    # How much of the files that it reads counts as its memory depends on the kernel.
    assert 30e6 < float(str(state["memory_bytes"])) < 1e9
    status = machine.run("cat", f"/proc/{state['pid']}/status").stdout
    assert int(re.search(r"Uid:\s+(\d+)", status)[1]) > 60000  # type: ignore[index]
    assert re.search(r"CapEff:\s+0+\n", status) and re.search(r"Seccomp:\s+2", status)

    target = f"{SOURCE}/tests/toy_family/target-v1"
    arguments = ["--", "--port", str(board.verifier_port), "--threads", "1"]
    machine.cloud("service", "install", "--now", target, *arguments)
    assert httpx.get(f"http://127.0.0.1:{board.verifier_port}/readyz").status_code == 200
    status = machine.cloud("service", "status").stdout
    assert "active (running)" in status and "target-v1@" in status and "0 sessions" in status


def check_credentials(board: Board) -> None:
    with RecordingRelay(board.relay_port, board.verifier_port) as sent:
        assert board.answer(key="another").status_code == 401
        board.text()
        assert f"authorization: Bearer {TOKEN}".encode() in bytes(sent)
        # While the relay accepts connections: without it, the next check finds the verifier gone again.
        wait_until(lambda: httpx.get(f"{board.url}/readyz").status_code == 200)
        wait_until(lambda: board.state()["error"] == "")
        wait_until(lambda: "the verifier answers again" in board.machine.journal(EDGE))
    wait_until(lambda: re.search(r"K=\d+ n=\d+, rtt \d+ ms, 0 answers", str(board.state()["text"])))
    entries = [json.loads(line) for line in board.machine.journal(EDGE, "--output=json").splitlines()]
    counted = [entry for entry in entries if "FLEXSPEC_TOKENS" in entry]
    assert [(entry["FLEXSPEC_TOKENS"], entry["PRIORITY"]) for entry in counted] == [("16", "6")]
    assert "unmistakable" not in board.machine.journal(EDGE, "--output=export")


def check_reload(board: Board) -> None:
    with RecordingRelay(board.relay_port, board.verifier_port):
        before = board.text()
        board.configure(
            planner='policy = "fixed"', log="prompts = true", service="max_waiting = 3", draft="threads = 1"
        )
        board.reload("0 answers$")
        wait_until(lambda: "changed: log.prompts, planner.policy, service.max_waiting" in board.machine.journal(EDGE))
        assert "change only after a restart: draft.threads" in board.machine.journal(EDGE)
        assert board.text() == before
        wait_until(lambda: str(board.state()["text"]).startswith("K=5"))
        assert "unmistakable" in board.machine.journal(EDGE)

        board.configure(planner='policy = "nonsense"', log='level = "error"')
        board.reload("the configuration has errors")
        assert "planner.policy: must be one of" in board.machine.journal(EDGE)
        assert board.text() == before
        board.configure()
        board.reload("0 answers$")
        assert board.state()["restarts"] == 0


def check_watchdog(board: Board) -> None:
    machine = board.machine
    override = machine.root / f"etc/systemd/system/{EDGE}.service.d/sooner.conf"
    override.parent.mkdir()
    override.write_text("[Service]\nWatchdogSec=3\nRestartSec=100ms\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", EDGE)
    pid = board.state()["pid"]
    machine.run("kill", "-STOP", str(pid))
    wait_until(lambda: board.state()["restarts"] == 1 and board.state()["state"] == "active")
    assert board.state()["pid"] != pid
    journal = machine.journal(EDGE)
    assert "Watchdog timeout" in journal
    # faulthandler has printed the stacks.
    assert "Fatal Python error: Aborted" in journal
    with RecordingRelay(board.relay_port, board.verifier_port):
        board.text()


def check_stop_and_uninstall(board: Board) -> None:
    machine = board.machine
    machine.run("systemctl", "stop", EDGE, VERIFIER)
    # The result would be a timeout if systemd had had to kill them after TimeoutStopSec=.
    for unit in (EDGE, VERIFIER):
        assert machine.unit_property(unit, "Result") == "success"
        assert machine.unit_property(unit, "ExecMainStatus") == "0"
    assert "removed" in machine.edge("service", "uninstall").stdout
    assert "removed" in machine.cloud("service", "uninstall").stdout
    assert "not installed" in machine.edge("service", "uninstall").stdout
    assert board.state()["installed"] is False
    assert list((machine.root / "etc/systemd/system").rglob("*flexspec*.service")) == []
    # Uninstalling keeps the bundle store.
    assert (machine.root / "var/lib/private/flexspec/bundles/current").is_symlink()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until `condition` returns something true."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class RecordingRelay:
    """A TCP relay from one port to another; as a context manager, yields what clients send."""

    def __init__(self, port: int, target_port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", port))
        self._target_port = target_port
        self._recorded = bytearray()

    def __enter__(self) -> bytearray:
        threading.Thread(target=self._accept, daemon=True).start()
        return self._recorded

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        for client in self._clients():
            verifier = socket.create_connection(("127.0.0.1", self._target_port))
            for source, sink, recorded in ((client, verifier, self._recorded), (verifier, client, bytearray())):
                threading.Thread(target=self._pass, args=(source, sink, recorded), daemon=True).start()

    def _clients(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self._server.accept()[0]
            except OSError:
                return

    def _pass(self, source: socket.socket, sink: socket.socket, recorded: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                recorded += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()
