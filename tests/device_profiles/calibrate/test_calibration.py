"""Calibration on this very machine, with the shipped draft and a real verifier; sensors are files that can be moved."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from cloud_verifier.model.target import Target
from device_profiles import cli
from device_profiles.calibrate import calibration, chart, machine, output
from device_profiles.calibrate.calibration import (
    CalibrationConfig,
    DraftPass,
    calibrate,
    measure_draft,
    measure_link,
    measure_sustained,
)
from device_profiles.calibrate.chart import ChartLine, line_chart
from device_profiles.calibrate.wattmeter import Wattmeter
from edge_runtime.planning.board_profile import (
    MIN_STEADY_PASSES,
    BoardProfile,
    ProfileError,
    cache_bytes,
    read_profile,
    shipped_profiles,
    weight_bytes,
)
from edge_runtime.probes import Prober
from edge_runtime.probes.reader import Roots
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import VerifierUnreachable
from tests.conftest import serving
from tests.edge_runtime.probes.conftest import BOARDS, roots_of

SVG = "{http://www.w3.org/2000/svg}"


def no_sensor() -> float | None:
    return None


def silent(note: str) -> None:
    pass


@pytest.fixture(scope="module")
def calibrated(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of this machine, made in two seconds by the command line."""
    path = tmp_path_factory.mktemp("calibrated") / "this-board.toml"
    arguments = ["calibrate", "--bundle", str(family / "bundle"), "--output", str(path), "--seconds", "2"]
    assert cli.main([*arguments, "--title", "A <board> & more", "--like", "raspberry-pi-4"]) == 0
    return path


@pytest.mark.slow
def test_the_profile_is_valid_and_measured(calibrated: Path, family: Path) -> None:
    profile = read_profile(calibrated)
    manifest = read_bundle(family / "bundle", verify=False).manifest
    assert (profile.name, profile.title, profile.origin) == ("this-board", "A <board> & more", "measured")
    assert profile.processor.origin == "measured"
    assert profile.processor.cores == machine.count_cores()
    assert [speed.threads for speed in profile.draft] == calibration.thread_counts(machine.count_cores())
    for speed in profile.draft:
        assert speed.weight_bytes == weight_bytes(manifest)
        assert 16 in speed.milliseconds and max(speed.milliseconds) <= manifest.architecture.context
        assert speed.prefill_tokens_per_second > 0 and speed.seconds(0) > 0
        assert speed.watts is None
    assert profile.find_measurement(weight_bytes(manifest), 100) is not None
    assert profile.draft_seconds(weight_bytes(manifest), 100) < 1
    assert profile.processor.weight_bytes_per_second > 1e8
    found = profile.calibration
    assert found is not None
    assert found.kernel == machine.kernel() and found.runtime.startswith("onnxruntime 1.")


@pytest.mark.slow
def test_what_cannot_be_measured_is_taken_from_a_like_board_and_says_so(calibrated: Path) -> None:
    profile = read_profile(calibrated)
    pi = next(profile for profile in shipped_profiles() if profile.name == "raspberry-pi-4")
    assert (profile.power, profile.radio, profile.sensors) == (pi.power, pi.radio, pi.sensors)
    assert profile.power is not None and profile.power.origin == "published"


def test_the_picture_is_svg_with_a_line_for_each_number_of_threads(calibrated: Path) -> None:
    profile = read_profile(calibrated)
    root = ET.fromstring(calibrated.with_suffix(".svg").read_bytes())
    assert root.tag == f"{SVG}svg"
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert texts[0].startswith("A <board> & more")
    assert {"context, tokens", "ms per drafted token", "1 thread"} <= set(texts)
    assert any(text.startswith("modeled, ") for text in texts)
    curves = [line for line in root.iter(f"{SVG}polyline") if "modeled" not in line.attrib["class"]]
    assert len(curves) == len(profile.draft)
    assert len(list(root.iter(f"{SVG}circle"))) == sum(len(speed.milliseconds) for speed in profile.draft)
    assert "prefers-color-scheme: dark" in (root.findtext(f"{SVG}style") or "")


@pytest.mark.slow
def test_calibrating_again_needs_force(calibrated: Path, family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = calibrated.read_bytes()
    capsys.readouterr()
    arguments = ["calibrate", "--bundle", str(family / "bundle"), "--output", str(calibrated), "--seconds", "1"]
    assert cli.main(arguments) == 2
    assert f"{calibrated} exists: give --force" in capsys.readouterr().err
    assert calibrated.read_bytes() == before
    assert cli.main([*arguments, "--force", "--json", "--like", "raspberry-pi-5"]) == 0
    out, err = capsys.readouterr()
    profile = msgspec.json.decode(out, type=BoardProfile, strict=False)
    assert profile == read_profile(calibrated) != before
    # The verdict, and a warning unless this machine is such a board.
    assert "draft tokens/s" in err and "does drafting pay?" in err
    assert ("--like raspberry-pi-5: this machine is a" in err) is not machine.read_device_tree_model().startswith(
        "Raspberry Pi 5"
    )


@pytest.mark.slow
def test_an_interruption_writes_nothing(family: Path, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    arguments = ["calibrate", "--bundle", str(family / "bundle"), "--output", str(path)]
    command = [sys.executable, "-m", "device_profiles.cli", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        # Once it has loaded the draft, it measures for a minute.
        while "onnxruntime_pybind11_state" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in said
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_writing_leaves_the_old_profile(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = msgspec.structs.replace(read_profile(calibrated), name="board")
    path = tmp_path / "board.toml"
    output.save(path, profile, "<svg/>")
    before = path.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output.save(path, msgspec.structs.replace(profile, title="another"), "<svg></svg>")
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["board.svg", "board.toml"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "{tmp}/board.json"], "{tmp}/board.json is not a .toml file"),
        (["--output", "{tmp}/nowhere/board.toml"], "there is no directory {tmp}/nowhere"),
        (["--output", "{tmp}/board.toml", "--name", "other"], "--name other and --output {tmp}/board.toml differ, but"),
        (["--output", "{tmp}/My Board.toml"], "'My Board' is not a valid profile name"),
        (["--output", "{tmp}/board.toml", "--like", "abacus"], "no shipped profile 'abacus'"),
        (["--output", "{tmp}/board.toml", "--verifier", "gopher://x"], "'gopher://x' is not the URL of a verifier"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_is_measured(
    arguments: list[str], sentence: str, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert cli.main(["calibrate", "--bundle", str(family / "bundle"), *given]) == 2
    assert f"device-profile: {sentence.format(tmp=tmp_path)}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", ["0.5", "7201", "nan"])
def test_a_calibration_takes_seconds_to_hours(seconds: str, family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["calibrate", "--bundle", str(family / "bundle"), "--seconds", seconds])
    assert f"--seconds: {seconds} is not between 1 and 7200" in capsys.readouterr().err


def test_a_missing_bundle_has_the_exit_code_of_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--bundle", str(tmp_path), "--output", str(tmp_path / "board.toml")]) == 3
    assert f"no draft bundle at {tmp_path}" in capsys.readouterr().err


async def test_the_link_to_a_verifier_is_measured(tiny: Target) -> None:
    async with serving(tiny) as server:
        assert 0 < await measure_link(server.url, 0.0, silent) < 1


async def test_a_verifier_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "VERIFIER_SECONDS", 0.3)
    with pytest.raises(VerifierUnreachable, match=r"no usable answer from http://127\.0\.0\.1:1"):
        await measure_link("http://127.0.0.1:1", 0.0, silent)


@pytest.mark.slow
def test_the_draft_is_measured_until_the_passes_agree(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(family / "bundle")
    monkeypatch.setattr(calibration, "thread_counts", lambda cores: [1])
    monkeypatch.setattr(calibration, "PASS_SHARE", 1e-4)
    monkeypatch.setattr(calibration, "TARGET_SPREAD", 1e9)
    (agreed,) = measure_draft(bundle, 600.0, no_sensor, silent)
    assert agreed.passes == MIN_STEADY_PASSES
    # No two passes take exactly the same time, so these go on until the time is over.
    monkeypatch.setattr(calibration, "TARGET_SPREAD", -1.0)
    (unsteady,) = measure_draft(bundle, 2.0, no_sensor, silent)
    assert unsteady.passes >= 1 and (unsteady.spread > 0 or unsteady.passes == 1)
    assert not msgspec.structs.replace(unsteady, passes=1).is_steady


def test_the_spread_is_that_of_the_worst_context_and_forgives_one_pass_of_five() -> None:
    passes = [DraftPass({16: 1.0, 512: 2.0}, 100.0), DraftPass({16: 1.1, 512: 2.1}, 100.0)]
    assert calibration._spread(passes) == pytest.approx(0.1 / 1.05)
    three = [DraftPass({16: time}, 100.0) for time in (3.67, 0.43, 1.45)]
    assert calibration._spread(three) == pytest.approx((3.67 - 0.43) / 1.45)
    five = [DraftPass({16: time}, 100.0) for time in (1.0, 1.01, 1.02, 1.03, 9.0)]
    assert calibration._spread(five) == pytest.approx(0.03 / 1.02)


@pytest.mark.slow
def test_sustained_load_is_sampled_with_heat_clock_and_throttling(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MIN_SAMPLE_SECONDS", 0.1)
    prober = Prober(roots_of(BOARDS / "raspberry-pi-4"))
    expected = prober.take()
    assert expected.thermal is not None and expected.processor is not None and expected.throttling is not None
    samples = measure_sustained(read_bundle(family / "bundle"), 1, 0.8, silent, prober)
    assert len(samples) >= 2 and samples == sorted(samples, key=lambda sample: sample.seconds)
    for sample in samples:
        assert sample.milliseconds > 0
        assert (sample.celsius, sample.hertz) == (expected.thermal.celsius, expected.processor.hertz)
        assert sample.throttled == expected.throttling.reasons
    assert measure_sustained(read_bundle(family / "bundle"), 1, 0.01, silent, prober) == []


@pytest.mark.slow
def test_a_sensor_is_found_and_watched(family: Path, tmp_path: Path) -> None:
    chip = tmp_path / "class/hwmon/hwmon0"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina219\n")
    (chip / "power1_input").write_text("3210000\n")
    meter = Wattmeter(Roots(sysfs=tmp_path, procfs=tmp_path, run=lambda arguments: None))
    assert (meter(), meter.source) == (3.21, "ina219")
    notes: list[str] = []
    config = CalibrationConfig(family / "bundle", "board", seconds=4.0, sensor=meter.source)
    profile = calibrate(config, meter, notes.append)
    assert profile.power is not None
    assert (profile.power.origin, profile.power.idle_watts, profile.power.busy_watts) == ("measured", 3.21, 3.21)
    assert "ina219" in profile.power.sources[0]
    assert [speed.watts for speed in profile.draft] == [3.21] * len(profile.draft)
    # This sensor always reads the same, so drafting costs nothing above idle.
    assert profile.draft_joules(profile.draft[0].weight_bytes) == 0.0
    assert {"idle", "all cores busy"} <= set(notes)


def test_no_sensor_is_no_error(tmp_path: Path) -> None:
    meter = Wattmeter(Roots(sysfs=tmp_path, procfs=tmp_path, run=lambda arguments: None))
    assert (meter(), meter.source) == (None, "")


def test_contexts_and_threads_cover_what_a_draft_and_a_board_have() -> None:
    assert calibration.contexts(2048) == [16, 128, 512, 1024, 2044]
    assert calibration.contexts(300) == [16, 128, 296]
    assert calibration.contexts(5) == [1]
    assert [calibration.thread_counts(cores) for cores in (1, 2, 3, 4, 6, 32)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_the_machine_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    assert (machine.read_board_model(tmp_path), machine.governor(tmp_path)) == ("Some CPU", "")
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    policy = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    policy.mkdir(parents=True)
    (policy / "scaling_governor").write_text("ondemand\n")
    assert (machine.read_board_model(tmp_path), machine.governor(tmp_path)) == (
        "Raspberry Pi 5 Model B Rev 1.0",
        "ondemand",
    )


def test_the_modeled_line_is_the_profiles_model(calibrated: Path, family: Path) -> None:
    profile = read_profile(calibrated)
    manifest = read_bundle(family / "bundle", verify=False).manifest
    svg = output.draft_chart(profile, cache_bytes(manifest))
    heights = re.findall(r'class="curve modeled" stroke="[^"]*" points="([^"]*)"', svg)[0].split()
    low, high = float(heights[0].split(",")[1]), float(heights[-1].split(",")[1])
    # SVG counts downwards: a longer context costs more.
    assert high <= low


def test_a_chart_of_a_single_point() -> None:
    root = ET.fromstring(line_chart('a "b" <c>', "x", "y", [ChartLine("one & only", [(16.0, 0.003)])]))
    assert root.attrib["aria-label"] == 'a "b" <c>'
    (circle,) = root.iter(f"{SVG}circle")
    assert chart.LEFT < float(circle.attrib["cx"]) < chart.WIDTH - chart.RIGHT
    assert chart.TOP <= float(circle.attrib["cy"]) < chart.HEIGHT - chart.BOTTOM


def test_a_profile_is_not_written_over_by_accident(tmp_path: Path) -> None:
    (tmp_path / "board.svg").write_text("mine")
    with pytest.raises(ProfileError, match=r"board\.svg exists"):
        output.check_writable(tmp_path / "board.toml", force=False)
    output.check_writable(tmp_path / "board.toml", force=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
