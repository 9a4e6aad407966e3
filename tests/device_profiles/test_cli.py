"""`device-profile` for people and programs: list, show, compare, validate. Calibration has tests of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from device_profiles import cli
from device_profiles.comparison import DraftSize
from edge_runtime.planning.board_profile import BOARDS_DIRECTORY, BoardProfile, shipped_profiles
from tests.device_profiles.boards import BOARD, changed, save

Captured = pytest.CaptureFixture[str]


def run_json(capsys: Captured, *arguments: str | Path) -> Any:
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list(capsys: Captured) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [profile.name for profile in shipped_profiles()]
    assert [entry["name"] for entry in run_json(capsys, "list")] == [profile.name for profile in shipped_profiles()]


@pytest.mark.parametrize("profile", shipped_profiles(), ids=lambda profile: profile.name)
def test_show_as_json_is_the_profile(profile: BoardProfile, capsys: Captured) -> None:
    assert msgspec.convert(run_json(capsys, "show", profile.name), BoardProfile, strict=False) == profile


def test_show_for_people_has_every_figure_and_source(tmp_path: Path, capsys: Captured) -> None:
    assert cli.main(["show", str(save(tmp_path))]) == 0
    out = capsys.readouterr().out
    for table in ("processor", "power", "sensors", "draft", r"radio\.lte"):
        assert re.search(rf"^{table}\b", out, re.MULTILINE)
    for field in [*BOARD["processor"], *BOARD["power"], *BOARD["draft"][0]]:
        assert field in ("origin", "sources") or re.search(rf"^  {field} ", out, re.MULTILINE)
    assert "source: a stopwatch" in out and "(published)" in out
    assert "16: 2, 116: 3, 1116: 5" in out.replace(".0", "")


def test_show_with_weights_adds_modeled_costs(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "model.onnx.data").write_bytes(bytes(5_000_000))
    cost = run_json(capsys, "show", save(tmp_path), "--weights", tmp_path / "model.onnx.data")["cost"]
    assert (cost["milliseconds_per_token"], cost["joules_per_token"]) == (pytest.approx(1.0), pytest.approx(0.004))
    assert (cost["basis"], cost["joules_basis"]) == ("modeled", "modeled")
    assert cli.main(["show", str(save(tmp_path)), "--weights", str(tmp_path / "model.onnx.data")]) == 0
    assert "milliseconds_per_token" in capsys.readouterr().out


def test_compare_marks_what_is_measured_and_what_is_modeled(tmp_path: Path, family: Path, capsys: Captured) -> None:
    files = family / "bundle"
    size = sum((files / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    cached = DraftSize.from_bundle(files).cache_bytes
    board = save(tmp_path, changed("draft.0.weight_bytes", size))
    arguments = ["raspberry-pi-5", board, "--bundle", files, "--context", "116"]
    pi, mine = (found["cost"] for found in run_json(capsys, "compare", *arguments))
    assert (pi["basis"], mine["basis"], mine["joules_basis"]) == ("modeled", "measured", "measured")
    assert mine["milliseconds_per_token"] == pytest.approx(3.0)
    assert mine["tokens_per_second"] == pytest.approx(1000 / 3)
    assert mine["joules_per_token"] == pytest.approx(0.003 * 2)
    assert pi["milliseconds_per_token"] == pytest.approx((size + 116 * cached) / 10e9 * 1e3)

    assert cli.main(["compare", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    heading, *rows = (re.split(r"\s*[┃│]\s*", line)[1:-1] for line in out.splitlines() if re.search("[┃│]", line))
    assert heading == ["", "raspberry-pi-5", "board"]
    table = {row[0]: row[1:] for row in rows}
    assert table["origin"] == ["published", "measured"]
    assert table["busy W"] == ["12.4 published", "6 measured"]
    assert table["ms per token"][1] == "3 measured" and table["ms per token"][0].endswith("modeled")
    assert table["5g active W, tail J"][1] == "-"


def test_compare_without_a_draft_and_without_power(tmp_path: Path, capsys: Captured) -> None:
    save(tmp_path, changed("power", None))
    assert cli.main(["compare", "laptop", str(tmp_path / "board.toml")]) == 0
    out = capsys.readouterr().out
    assert "ms per token" not in out
    assert re.search(r"idle W .* 6\.5 derived .* - ", out)


def test_validate(tmp_path: Path, capsys: Captured) -> None:
    good = [*map(str, sorted(BOARDS_DIRECTORY.glob("*.toml"))), str(save(tmp_path))]
    assert cli.main(["validate", *good]) == 0
    assert capsys.readouterr().out.count(": valid\n") == len(good)


def test_validate_checks_the_rest_after_a_wrong_one(tmp_path: Path, capsys: Captured) -> None:
    wrong = save(tmp_path, changed("power.idle_watts", "low"))
    good = BOARDS_DIRECTORY / "laptop.toml"
    assert cli.main(["validate", str(wrong), "nowhere.toml", str(good)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{good}: valid\n"
    assert "power.idle_watts: Expected `float`, got `str`" in err and "cannot read the profile nowhere.toml" in err
    assert cli.main(["validate", str(wrong), str(good), "--json"]) == 2
    results = json.loads(capsys.readouterr().out)
    assert [bool(result["error"]) for result in results] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["show", "abacus"], 2, "no shipped profile 'abacus': there are jetson-orin-nano, laptop, "),
        (["show", "nowhere.toml"], 2, "cannot read the profile nowhere.toml"),
        (["show", "raspberry-pi-5", "--weights", "nowhere"], 2, "cannot read nowhere"),
        (["compare", "laptop", "abacus"], 2, "no shipped profile 'abacus'"),
        (["compare", "laptop", "--bundle", "nowhere"], 3, "no draft bundle at nowhere"),
        (["validate", "nowhere.toml"], 2, "cannot read the profile nowhere.toml"),
    ],
)
def test_errors_are_a_sentence_and_an_exit_code(
    arguments: list[str], code: int, sentence: str, capsys: Captured
) -> None:
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"device-profile: {sentence}")


@pytest.mark.parametrize(
    "arguments", [[], ["calibrate"], ["compare"], ["show", "laptop", "--weights", "a", "--bundle", "b"]]
)
def test_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.delenv("FLEXSPEC_BUNDLE", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: device-profile" in capsys.readouterr().err


def test_help_has_examples(capsys: Captured) -> None:
    for arguments in (["--help"], ["calibrate", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        assert "device-profile calibrate --bundle" in capsys.readouterr().out
