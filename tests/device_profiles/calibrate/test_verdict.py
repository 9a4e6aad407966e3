"""What a calibration means: the verdict in words, and the commands that follow it."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from device_profiles.calibrate.verdict import compare_costs, describe_result
from edge_runtime.cli.draft_options import load_draft
from edge_runtime.cli.planner_options import add_planner_options, make_planner
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.board_profile import (
    BoardProfile,
    Calibration,
    SustainedSample,
    draft_sha256,
    shipped_profiles,
    weight_bytes,
)
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.protocol.bundle import Manifest, read_bundle
from edge_runtime.settings import Settings
from tests.conftest import FAMILY
from tests.device_profiles.boards import BOARD, save
from tests.edge_runtime.probes.conftest import BOARDS as RECORDED

BUNDLE = FAMILY / "bundle"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_bundle(BUNDLE, verify=False).manifest


@pytest.fixture
def profile(manifest: Manifest) -> BoardProfile:
    """BOARD, measured steadily with the toy draft: 4 threads are fastest at 512 tokens."""
    board = msgspec.convert(BOARD, BoardProfile, strict=False)
    mine: dict[str, Any] = {"weight_bytes": weight_bytes(manifest), "sha256": draft_sha256(manifest)}
    entries = [msgspec.structs.replace(entry, passes=5, spread=0.04, **mine) for entry in board.draft]
    return msgspec.structs.replace(board, draft=entries)


def sustained(*samples: SustainedSample) -> Calibration:
    return Calibration(datetime.date(2026, 11, 29), 600.0, "Linux", "onnxruntime", sustained=list(samples))


def line(profile: BoardProfile, manifest: Manifest, beginning: str) -> str:
    (found,) = (text for text in describe_result(profile, manifest, {}) if text.startswith(beginning))
    return found


def test_speed_threads_and_power_are_told(profile: BoardProfile, manifest: Manifest) -> None:
    milliseconds = 1 + (512 - 16) / 1100 * 5
    assert f"{1e3 / milliseconds:.3g} draft tokens/s after 512 tokens" in line(profile, manifest, "speed: ")
    assert "with 4 threads; prefill 5e+03 tokens/s" in line(profile, manifest, "speed: ")
    assert "--threads 4 is the fastest; commands with --profile" in line(profile, manifest, "threads: ")
    assert line(profile, manifest, "power: ") == "power: 2 W idle, 6 W busy (measured)"
    assert line(profile, manifest, "heat: ") == "heat: not measured; give it more --seconds"
    without = msgspec.structs.replace(profile, power=None)
    assert "no sensor, and no --like profile" in line(without, manifest, "power: ")


@pytest.mark.parametrize(("passes", "spread"), [(1, 0.0), (2, 0.1), (5, 0.16), (5, 7.0)])
def test_what_did_not_agree_is_called_unsteady_and_not_used(
    passes: int, spread: float, profile: BoardProfile, manifest: Manifest, tmp_path: Path
) -> None:
    entries = [msgspec.structs.replace(entry, passes=passes, spread=spread) for entry in profile.draft]
    unsteady = msgspec.structs.replace(profile, draft=entries)
    assert f"{passes} measurements of the same figure spread by" in line(unsteady, manifest, "UNSTEADY: ")
    assert line(unsteady, manifest, "threads: ") == "threads: --threads 4 is the fastest"
    assert unsteady.steady_measurement(manifest) is None
    assert load_draft(BUNDLE, settings(tmp_path, unsteady)).threads == load_draft(BUNDLE, Settings()).threads


def test_heat_is_judged_over_the_whole_load(profile: BoardProfile, manifest: Manifest) -> None:
    cold = [SustainedSample(10.0 * n, 1.0, 60.0, 2.4e9) for n in range(1, 31)]
    hot = [SustainedSample(300 + 10.0 * n, 1.8, 84.0, 1.5e9, ["soft temperature limit"]) for n in range(1, 31)]
    throttled = msgspec.structs.replace(profile, calibration=sustained(*cold, *hot))
    assert line(throttled, manifest, "heat: ") == (
        "heat: after 600 s of drafting without a pause it takes 1.8 times as long (84 degrees Celsius, 1.5 GHz, soft "
        "temperature limit)"
    )
    unknown = [msgspec.structs.replace(sample, throttled=[]) for sample in hot]
    noisy = [msgspec.structs.replace(entry, spread=1.0) for entry in profile.draft]
    unsteady = msgspec.structs.replace(profile, draft=noisy, calibration=sustained(*cold, *unknown))
    assert line(unsteady, manifest, "heat: ").endswith("1.5 GHz), or other programs slow it down")
    steady = msgspec.structs.replace(profile, calibration=sustained(*cold))
    assert "no slower after 300 s of drafting" in line(steady, manifest, "heat: ")
    short = msgspec.structs.replace(profile, calibration=sustained(*cold[:3]))
    assert "too short to tell; give it --seconds 600" in line(short, manifest, "heat: ")


def test_links_are_judged_by_the_planners_comparison(profile: BoardProfile, manifest: Manifest) -> None:
    lines = list(describe_result(profile, manifest, {"https://verifier.example": 0.3}))
    (mine,) = (text for text in lines if text.startswith("  https://verifier.example (300 ms): "))
    assert "7b: " in mine and "32b: " in mine and "loaded: " in mine
    lan = next(text for text in lines if text.startswith("  lan (2 ms): "))
    # A slow verifier nearby is worth drafting for; a fast one far away is not.
    assert "loaded: " in lan and "yes, K = " in lan.partition("loaded: ")[2]
    assert mine.partition("7b: ")[2].partition(";")[0].endswith("no")


def test_drafting_pays_more_the_slower_the_verifier_and_the_closer(manifest: Manifest) -> None:
    device = DeviceModel(step_seconds=0.004)
    gains = {}
    for link in (0.002, 0.2):
        for forward in (0.008, 0.08):
            comparison = compare_costs(device, manifest, link, forward)
            gains[link, forward] = comparison.streamed / comparison.drafted
            # The planner has learned link and verifier from what it was shown.
            assert comparison.streamed == pytest.approx(link + 200 * forward, rel=0.2)
    assert gains[0.002, 0.08] > gains[0.002, 0.008] > gains[0.2, 0.008]
    assert gains[0.002, 0.08] > 1 > gains[0.2, 0.008]


def settings(directory: Path, profile: BoardProfile) -> Settings:
    """Settings with this profile."""
    path = save(directory, msgspec.to_builtins(profile, builtin_types=(datetime.date,), str_keys=True))
    return Settings().replace({"planner.profile": str(path)})


def test_commands_use_what_was_measured(profile: BoardProfile, manifest: Manifest, tmp_path: Path) -> None:
    mine = settings(tmp_path, profile)
    draft = load_draft(BUNDLE, mine)
    assert draft.threads == 4
    assert load_draft(BUNDLE, mine.replace({"draft.threads": 1})).threads == 1
    parser = argparse.ArgumentParser()
    add_planner_options(parser)
    planner = make_planner(parser.parse_args([]), mine.planner, draft)
    assert isinstance(planner, AnalyticPlanner)
    device = planner._device
    assert (device.step_seconds, device.prefill_seconds) == (0.001, 1 / 5000)
    assert device.step_seconds_per_token == pytest.approx((0.001 + 0.005 * (1024 - 16) / 1100 - 0.001) / 1024)
    # Nothing was measured with one thread more, so the speed is measured at the start, as without a profile.
    other = load_draft(BUNDLE, mine.replace({"draft.threads": 3}))
    planner = make_planner(parser.parse_args([]), mine.planner, other)
    assert isinstance(planner, AnalyticPlanner) and planner._device.step_seconds != 0.001


def test_a_profile_of_another_draft_is_not_taken_for_this_one(
    profile: BoardProfile, manifest: Manifest, tmp_path: Path
) -> None:
    entries = [msgspec.structs.replace(entry, sha256="0" * 64) for entry in profile.draft]
    other = msgspec.structs.replace(profile, draft=entries)
    assert other.steady_measurement(manifest) is None
    assert load_draft(BUNDLE, settings(tmp_path, other)).threads == load_draft(BUNDLE, Settings()).threads


def test_machines_that_evidently_are_no_such_board() -> None:
    profiles = {profile.name: profile for profile in shipped_profiles()}
    assert {name for name in profiles if profiles[name].is_evidently_other("")} == {
        "jetson-orin-nano",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "raspberry-pi-zero-2w",
    }
    for name in ("jetson-orin-nano", "raspberry-pi-4", "raspberry-pi-5", "raspberry-pi-zero-2w"):
        model = (RECORDED / name / "sysfs/firmware/devicetree/base/model").read_text().rstrip("\0\n")
        assert {other for other in profiles if not profiles[other].is_evidently_other(model)} == {name}
