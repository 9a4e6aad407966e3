"""Board and verifier as services of a real init, from installation to removal."""

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
# A space, a specifier and a variable, as far as a unit is concerned.
CONFIG = "/etc/flexspec/my %n $HOME.toml"
PROMPT = "def unmistakable_prompt("
TOKEN, KEY = "token-of-the-verifier", "key-of-the-board"
SECONDS = 60.0


@pytest.mark.slow
def test_a_board_and_its_verifier_live_and_end_with_systemd(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:
        ports = [free_port() for _ in range(3)]
        board = Board(machine, *ports)
        needs_a_draft_to_be_ready(board)
        starts(board)
        answers_with_its_credentials(board)
        reads_its_configuration_again(board)
        is_started_again_when_it_hangs(board)
        ends_in_time_and_leaves_no_unit(board)


class Board:
    """The service under test, its configuration, and a wire to its verifier that is listened to."""

    def __init__(self, machine: Machine, port: int, wire_port: int, verifier_port: int) -> None:
        self.machine = machine
        self.url = f"http://127.0.0.1:{port}"
        self.port, self.wire_port, self.verifier_port = port, wire_port, verifier_port
        etc = machine.root / "etc"
        (etc / "flexspec").mkdir()
        store = etc / "credstore"
        store.mkdir(mode=0o700)
        for name, secret in (("flexspec.verifier-token", TOKEN), ("flexspec.api-key", KEY)):
            (store / name).write_text(secret)
            (store / name).chmod(0o600)
        self.configure()

    def configure(self, **tables: str) -> None:
        """Writes the configuration; `tables` have more lines for it."""
        common = {
            "verifier": f'urls = ["http://127.0.0.1:{self.wire_port}"]\nhttp2 = false',
            "service": f"port = {self.port}",
        }
        lines = [f"[{name}]\n{common.get(name, '')}\n{tables.get(name, '')}" for name in {**common, **tables}]
        (self.machine.root / CONFIG[1:]).write_text("\n".join(lines))

    def state(self) -> dict[str, object]:
        """What `edge-runtime service status` says."""
        said = self.machine.edge("service", "status", "--json", check=False)
        state: dict[str, object] = json.loads(said.stdout)
        assert said.returncode == (0 if state["state"] in ("active", "reloading") else 3)
        return state

    def answer(self, key: str = KEY) -> httpx.Response:
        """Asks for one; the same every time."""
        asked = {"model": "", "prompt": PROMPT, "max_tokens": 16, "temperature": 0.7, "seed": 1}
        return httpx.post(
            f"{self.url}/v1/completions", json=asked, headers={"authorization": f"Bearer {key}"}, timeout=SECONDS
        )

    def text(self) -> str:
        response = self.answer()
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def reload(self, status: str) -> None:
        """Reloads, and waits until the status says what `status` matches."""
        self.machine.run("systemctl", "reload", EDGE)
        until(lambda: re.search(status, str(self.state()["text"])))


def needs_a_draft_to_be_ready(board: Board) -> None:
    board.configure(draft='bundle = "/etc"')
    refused = board.machine.edge("service", "install", "--now", "--config", CONFIG, check=False)
    assert refused.returncode == 1 and f"restart {EDGE}.service` failed" in refused.stderr
    state = board.state()
    assert (state["installed"], state["state"], state["restarts"]) == (True, "failed", 0)
    assert board.machine.shown(EDGE, "ExecMainStatus") == "3"
    assert "no draft bundle at /etc" in board.machine.journal(EDGE)


def starts(board: Board) -> None:
    machine = board.machine
    board.configure()
    machine.edge("bundle", "install", f"{SOURCE}/export/example_family/bundle", "--store", STORE)
    assert "as it was" in machine.edge("service", "install", "--now", "--config", CONFIG).stdout
    # It is ready, so it can answer; that there is no verifier yet is another matter.
    assert httpx.get(f"{board.url}/readyz").status_code == 200
    state = board.state()
    assert (state["state"], state["enabled"], state["text"]) == ("active", True, "no round yet, 0 answers")
    # What of the files that it reads is counted as its own depends on the kernel.
    assert 30e6 < float(str(state["memory_bytes"])) < 1e9
    assert f"{STORE.replace('lib/', 'lib/private/')}/" in machine.run("cat", f"/proc/{state['pid']}/maps").stdout
    status = machine.run("cat", f"/proc/{state['pid']}/status").stdout
    assert int(re.search(r"Uid:\s+(\d+)", status)[1]) > 60000  # type: ignore[index]
    assert re.search(r"CapEff:\s+0+\n", status) and re.search(r"Seccomp:\s+2", status)

    target = f"{SOURCE}/export/example_family/target-v1"
    arguments = ["--", "--port", str(board.verifier_port), "--threads", "1"]
    machine.cloud("service", "install", "--now", target, *arguments)
    assert httpx.get(f"http://127.0.0.1:{board.verifier_port}/readyz").status_code == 200
    said = machine.cloud("service", "status").stdout
    assert "active (running)" in said and "target-v1@" in said and "0 sessions" in said


def answers_with_its_credentials(board: Board) -> None:
    with wire(board.wire_port, board.verifier_port) as sent:
        assert board.answer(key="another").status_code == 401
        board.text()
    assert f"authorization: Bearer {TOKEN}".encode() in bytes(sent)
    until(lambda: re.search(r"K=\d+ n=\d+, rtt \d+ ms, 0 answers", str(board.state()["text"])))
    entries = [json.loads(line) for line in board.machine.journal(EDGE, "--output=json").splitlines()]
    counted = [entry for entry in entries if "FLEXSPEC_TOKENS" in entry]
    assert [(entry["FLEXSPEC_TOKENS"], entry["PRIORITY"]) for entry in counted] == [("16", "6")]
    assert "unmistakable" not in board.machine.journal(EDGE, "--output=export")


def reads_its_configuration_again(board: Board) -> None:
    with wire(board.wire_port, board.verifier_port):
        before = board.text()
        board.configure(
            planner='policy = "fixed"', log="prompts = true", service="max_waiting = 3", draft="threads = 1"
        )
        board.reload("0 answers$")
        until(lambda: "new: log_prompts, max_waiting, policy" in board.machine.journal(EDGE))
        assert "new only after a restart: threads" in board.machine.journal(EDGE)
        assert board.text() == before
        until(lambda: str(board.state()["text"]).startswith("K=5"))
        assert "unmistakable" in board.machine.journal(EDGE)

        board.configure(planner='policy = "nonsense"', log='level = "error"')
        board.reload("the configuration has errors")
        assert "'nonsense' is no policy" in board.machine.journal(EDGE)
        assert board.text() == before
        board.configure()
        board.reload("0 answers$")
        assert board.state()["restarts"] == 0


def is_started_again_when_it_hangs(board: Board) -> None:
    machine = board.machine
    override = machine.root / f"etc/systemd/system/{EDGE}.service.d/sooner.conf"
    override.parent.mkdir()
    override.write_text("[Service]\nWatchdogSec=3\nRestartSec=100ms\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", EDGE)
    pid = board.state()["pid"]
    machine.run("kill", "-STOP", str(pid))
    until(lambda: board.state()["restarts"] == 1 and board.state()["state"] == "active")
    assert board.state()["pid"] != pid
    journal = machine.journal(EDGE)
    assert "Watchdog timeout" in journal
    # It says where it hung.
    assert "Fatal Python error: Aborted" in journal
    with wire(board.wire_port, board.verifier_port):
        board.text()


def ends_in_time_and_leaves_no_unit(board: Board) -> None:
    machine = board.machine
    started = time.monotonic()
    machine.run("systemctl", "stop", EDGE, VERIFIER)
    assert time.monotonic() - started < 20.0
    for unit in (EDGE, VERIFIER):
        assert machine.shown(unit, "Result") == "success"
        assert machine.shown(unit, "ExecMainStatus") == "0"
    assert "removed" in machine.edge("service", "uninstall").stdout
    assert "removed" in machine.cloud("service", "uninstall").stdout
    assert "there is none" in machine.edge("service", "uninstall").stdout
    assert board.state()["installed"] is False
    assert list((machine.root / "etc/systemd/system").rglob("*flexspec*.service")) == []
    # The drafts stay.
    assert (machine.root / "var/lib/private/flexspec/bundles/current").is_symlink()


def until(true: Callable[[], object]) -> None:
    """Waits until `true` says so."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.3)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class wire:  # noqa: N801
    """A TCP relay from one port to another; gives what clients sent."""

    def __init__(self, port: int, to: int) -> None:
        self._server = socket.create_server(("127.0.0.1", port))
        self._to = to
        self._sent = bytearray()

    def __enter__(self) -> bytearray:
        threading.Thread(target=self._accept, daemon=True).start()
        return self._sent

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        for client in self._clients():
            verifier = socket.create_connection(("127.0.0.1", self._to))
            for source, sink, heard in ((client, verifier, self._sent), (verifier, client, bytearray())):
                threading.Thread(target=self._pass, args=(source, sink, heard), daemon=True).start()

    def _clients(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self._server.accept()[0]
            except OSError:
                return

    def _pass(self, source: socket.socket, sink: socket.socket, heard: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                heard += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()
