"""The processes of a tensor-parallel group, with programs in place of the verifier: this machine may have no GPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cloud_verifier.cli.main import main
from tests.cloud_verifier.protocol_client import TIMEOUT_SECONDS

# Each process of the group says that it is there; followers end when the leader has said so.
MEMBER = """
import os, signal, sys, time
from pathlib import Path

directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
if rank:
    from cloud_verifier.cli.gpu_processes import ignore_signals

    ignore_signals()
else:
    from edge_runtime.common.sd_notify import Notifier

    Notifier().ready("serving")

    def drain(*_):
        time.sleep(0.2)
        (directory / "stop").touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, drain)
partial = directory / f"{rank}.partial"
partial.write_text(" ".join([str(os.getpid()), *(os.environ[name] for name in names)]))
partial.rename(directory / f"{rank}.member")
failing = directory / f"fail{rank}"
while not (directory / "stop").exists():
    if failing.exists():
        sys.exit(7)
    time.sleep(0.01)
"""
LAUNCHER = "import sys; from cloud_verifier.cli.gpu_processes import run_group; sys.exit(run_group(sys.argv[1:], 3))"


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def service_manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket on which a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(TIMEOUT_SECONDS)
        yield manager


@pytest.fixture
def group(service_manager: socket.socket, tmp_path: Path) -> subprocess.Popen[bytes]:
    """The launcher of a group of three that has started."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-c", MEMBER, str(tmp_path)]
    environment = os.environ | {"NOTIFY_SOCKET": service_manager.getsockname()}
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    wait_until(lambda: len(list(tmp_path.glob("*.member"))) == 3)
    return launcher


def members(directory: Path) -> list[list[str]]:
    return [(directory / f"{rank}.member").read_text().split() for rank in range(3)]


def test_a_group_ends_as_its_leader_ends(
    group: subprocess.Popen[bytes], service_manager: socket.socket, tmp_path: Path
) -> None:
    started = members(tmp_path)
    assert b"READY=1" in service_manager.recv(4096)
    assert [each[1:4] for each in started] == [["3", str(rank), "127.0.0.1"] for rank in range(3)]
    assert len({each[4] for each in started}) == 1
    # As a service manager and a terminal do, to all processes.
    for pid, *_ in started[1:]:
        os.kill(int(pid), signal.SIGTERM)
        os.kill(int(pid), signal.SIGINT)
    group.terminate()
    assert group.wait(TIMEOUT_SECONDS) == 0
    assert not any(psutil.pid_exists(int(pid)) for pid, *_ in started)


@pytest.mark.parametrize(("rank", "code"), [(0, 7), (1, 1)])
def test_a_group_ends_with_a_process_that_fails(
    rank: int, code: int, group: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / f"fail{rank}").touch()
    _, stderr = group.communicate(timeout=TIMEOUT_SECONDS)
    assert group.returncode == code
    assert not any(psutil.pid_exists(int(pid)) for pid, *_ in members(tmp_path))
    assert (b"the process of GPU 1 ended with 7" in stderr) == (rank == 1)


def test_a_killed_launcher_leaves_no_process(group: subprocess.Popen[bytes], tmp_path: Path) -> None:
    group.kill()
    group.communicate(timeout=TIMEOUT_SECONDS)
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid, *_ in members(tmp_path)))


def test_several_gpus_are_for_a_target_on_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--gpus", "2"]) == 2
    assert "--gpus splits a target over GPUs: give --device cuda" in capsys.readouterr().err
