"""Files and programs that are present, absent or broken."""

from __future__ import annotations

import errno
import os
import platform
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.probes import reader as module
from edge_runtime.probes.reader import (
    ProbeError,
    ProgramFailed,
    Reader,
    RecordedPrograms,
    Roots,
    decimal,
    integer,
    read_bytes,
    run_program,
)
from edge_runtime.probes.snapshot import Prober
from tests.edge_runtime.probes.conftest import BOARDS


@given(st.integers(-(10**19), 10**19))
def test_integers(number: int) -> None:
    assert integer(str(number)) == number
    assert decimal(str(number)) == float(number)


def program(directory: Path, name: str, script: str) -> None:
    """Write a shell script that stands in for a sensor program."""
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_a_program_that_fails_is_told_apart_from_one_that_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRAM_PATH", str(tmp_path))
    reader = Reader(Roots(), 0.0)
    assert reader.program(str, "iw", "dev") is None and reader.errors == []
    program(tmp_path, "iw", "echo 'command failed: No such device (-19)' >&2; exit 237")
    assert reader.program(str, "iw", "dev", no_data={237}) is None and reader.errors == []
    assert reader.program(str, "iw", "dev") is None
    assert reader.errors == ["iw dev: exit code 237: command failed: No such device (-19)"]
    with pytest.raises(ProgramFailed) as caught:
        run_program(("iw",))
    assert caught.value.exit_code == 237


@pytest.mark.parametrize("code", [0, 255])
def test_firmware_that_may_not_be_asked_is_an_error_of_its_probe(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vcgencmd` says on standard output that its device is closed to it; old ones exit 0 all the same."""
    board = BOARDS / "raspberry-pi-5"
    monkeypatch.setattr(module, "PROGRAM_PATH", str(tmp_path))
    roots = Roots(board / "sysfs", board / "procfs")
    absent = Prober(roots).take()
    assert absent.firmware is None and absent.probes["firmware"].errors == []
    program(tmp_path, "vcgencmd", f'echo "Can\'t open device file: /dev/vcio_gencmd"; exit {code}')
    failed = Prober(roots).take()
    assert failed.firmware is None and failed.probes["firmware"].failures == 1
    assert any("vcgencmd pmic_read_adc: " in error for error in failed.probes["firmware"].errors)
    assert all("open device file: /dev/vcio_gencmd" in error for error in failed.probes["firmware"].errors)


def test_every_probe_that_runs_a_program_counts_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAM_PATH", str(tmp_path))
    for name in ("iw", "nmcli", "mmcli", "vcgencmd"):
        program(tmp_path, name, "echo broken >&2; exit 1")
    failed = set()
    for board in BOARDS.iterdir():
        snapshot = Prober(Roots(board / "sysfs", board / "procfs")).take()
        failed |= {name for name, report in snapshot.probes.items() if any("exit code 1" in e for e in report.errors)}
    assert failed == {"firmware", "stations", "modem", "metering"}


def test_programs_run_in_the_c_locale() -> None:
    said = run_program((sys.executable, "-c", "import os; print(os.environ['LC_ALL'])"))
    assert said == b"C\n"


def test_a_hanging_program_is_killed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAM_SECONDS", 0.1)
    reader = Reader(Roots(), 0.0)
    assert reader.program(str, sys.executable, "-c", "import time; time.sleep(60)") is None
    assert "no answer within 0.1 s" in reader.errors[0]


def test_a_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    # Where qemu-user emulates the start of a program, a failure of it is known by the exit code of a shell.
    emulated = "|exit code 127" if platform.machine() == "aarch64" else ""
    with pytest.raises(ProbeError, match="cannot be started" + emulated):
        run_program((str(broken),))


def test_recorded_programs(tmp_path: Path) -> None:
    (tmp_path / "iw_dev_wlan0_link").write_text("Not connected.\n")
    run = RecordedPrograms(tmp_path)
    assert run(("iw", "dev", "wlan0", "link")) == b"Not connected.\n"
    assert run(("iw", "dev", "wlan1", "link")) is None


def test_long_files_are_read_whole_and_endless_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"x" * 300_000)
    assert read_bytes(str(path)) == b"x" * 300_000
    with pytest.raises(ProbeError, match="longer than"):
        read_bytes("/dev/zero")


def test_a_pipe_without_writer_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(str(tmp_path / "pipe")) == b""


def test_names_are_sorted_by_number(tmp_path: Path) -> None:
    for name in ("hwmon10", "hwmon2", "other"):
        (tmp_path / name).mkdir()
    reader = Reader(Roots(), 0.0)
    assert reader.names(str(tmp_path), "hwmon") == ["hwmon2", "hwmon10"]
    assert reader.names(str(tmp_path / "none")) == [] and reader.errors == []


def test_a_file_that_may_not_be_read_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "open", refuse)
    reader = Reader(Roots(), 0.0)
    assert reader.integer("/sys/class/powercap/intel-rapl:0/energy_uj") is None
    assert "energy_uj: Permission denied; run as root" in reader.errors[0]
