"""`edge-runtime probe`, on a terminal and in scripts."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from edge_runtime.cli.probe_view import render_snapshot
from edge_runtime.probes.snapshot import Prober
from edge_runtime.probes.tcp import TcpInfo
from tests.edge_runtime.commands import run
from tests.edge_runtime.probes.conftest import BOARDS, NAMES, roots_of

if TYPE_CHECKING:
    from cloud_verifier.model.target import Target

COMMAND = [sys.executable, "-m", "edge_runtime.cli", "probe"]


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("probe", *arguments)


def root_options(board: str) -> list[str]:
    path = BOARDS / board
    return [f"--path.sysfs={path}/sysfs", f"--path.procfs={path}/procfs", f"--path.recorded={path}/bin"]


@pytest.fixture(scope="module")
def verifier(tiny: Target) -> Iterator[str]:
    from tests.cloud_verifier.protocol_client import running

    with running(tiny) as url:
        yield url


def render(board: str | Path, tcp: TcpInfo | None = None) -> str:
    """Render the files of a recorded board, or of any other directory."""
    console = Console(file=io.StringIO(), width=200)
    console.print(render_snapshot(Prober(roots_of(BOARDS / board)).take(), tcp))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("board", NAMES)
def test_every_recorded_board_is_rendered(board: str) -> None:
    assert "13 probes, 0 with errors" in render(board)


def test_a_sensor_in_the_batterys_line_is_shown_and_not_taken_for_the_board() -> None:
    text = render("ups-hat-battery-line", None)
    assert "power unknown, current flows backwards through ina219, as in the line of a battery" in " ".join(
        text.split()
    )
    assert "-5.396 W ina219" in text
    assert "-256" not in text and "-1 dBm" not in text


def test_rendered_readings() -> None:
    text = render(
        "ups-hat",
        TcpInfo(
            bytes_sent=10,
            bytes_received=20,
            rtt_seconds=0.0553,
            min_rtt_seconds=0.0412,
            rtt_variation_seconds=0.0101,
            retransmits=2,
            delivery_rate=None,
            bytes_acked=10,
            busy_seconds=0.1,
        ),
    )
    for words in (
        "Raspberry Pi Compute Module 4 Rev 1.1",
        "3.928 W, from ina219, whole board",
        "discharging, 63 %, 52.45 kJ left, 83.25 kJ when full",
        "RTT 55.3 ms ± 10.1 ms, minimum 41.2 ms",
        "10 bytes sent, 10 acknowledged, 20 received, 2 retransmits",
        "5.745 GHz",
    ):
        assert words in text
    assert "part of the board only" in render("raspberry-pi-5")
    assert "RSRP -104 dBm, RSRQ -11 dB, SINR 7.4 dB" in render("jetson-orin-nano")


def test_failures_are_rendered(tmp_path: Path) -> None:
    zone = tmp_path / "sysfs/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("hot")
    text = render(tmp_path)
    assert "1 of 1" in text and "not a whole number: 'hot'" in text and "1 with errors" in text


@pytest.mark.slow
def test_json_prints_one_object() -> None:
    done = probe("--json", *root_options("jetson-orin-nano"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    expected = json.loads((BOARDS / "jetson-orin-nano" / "expected.json").read_text())
    assert report["surroundings"] == expected["surroundings"]
    assert report["snapshot"]["modem"] == expected["modem"]
    assert report["tcp"] is None
    # --once takes two readings, because rates need two.
    assert report["snapshot"]["probes"]["processor"]["readings"] == 2
    assert report["snapshot"]["interfaces"][0]["received_bytes_per_second"] == 0.0


@pytest.mark.slow
def test_programs_are_not_run_for_the_files_of_another_machine() -> None:
    done = probe("--json", *root_options("jetson-orin-nano")[:2])
    assert json.loads(done.stdout)["snapshot"]["modem"] is None


@pytest.mark.slow
def test_the_tcp_statistics_of_a_verifier_connection(verifier: str) -> None:
    done = probe("--json", "--verifier", verifier)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tcp"]["bytes_sent"] > 50 and report["tcp"]["bytes_received"] > 50
    assert 0 < report["tcp"]["rtt_seconds"] == report["surroundings"]["rtt_seconds"] < 1
    assert report["snapshot"]["route"]["interface"] == "lo"


@pytest.mark.slow
def test_watch_prints_one_object_per_period() -> None:
    with subprocess.Popen([*COMMAND, "--json", "--watch", "--period", "0.05"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(300) == 130
    assert [line["snapshot"]["probes"]["route"]["readings"] for line in lines] == [2, 3, 4]


@pytest.mark.slow
def test_live_view_in_a_terminal() -> None:
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "60"}
    command = [*COMMAND, "--period", "0.1", *root_options("ups-hat")]
    with subprocess.Popen(command, stdout=side, stderr=side, stdin=side, env=environment) as process:
        os.close(side)
        text = b""
        deadline = time.monotonic() + 300
        while text.count(b"from ina219") < 2 and time.monotonic() < deadline:
            text += os.read(main, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    os.close(main)
    assert text.count(b"from ina219") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--period", "0"], "--period 0", 2),
        (["--period", "nan"], "--period: nan is not a number", 2),
        (["--path.sysfs", "nowhere"], "--path.sysfs nowhere: no such directory", 2),
        (["--watch", "--once"], "not allowed with", 2),
        (["--verifier", "ftp://x"], "not the URL of a verifier", 2),
    ],
)
def test_invalid_options(arguments: list[str], words: str, code: int) -> None:
    done = probe(*arguments)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_probes_import_no_slow_packages() -> None:
    program = (
        "import sys; from edge_runtime.cli import probe, probe_view; from edge_runtime.probes import snapshot; "
        "sys.exit(bool({'torch', 'transformers', 'optimum', 'pandas', 'matplotlib', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
