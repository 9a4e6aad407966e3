"""What boards are: the shipped profiles, the errors of a wrong one, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_profiles import cli
from device_profiles.profile import BOARDS, Profile, ProfileError, read_profile, shipped_profiles

BOARD: dict[str, object] = {
    "name": "board",
    "title": "A board",
    "origin": "measured",
    "sources": ["a meter"],
    "cores": 4,
    "weight_bytes_per_second": 5e9,
    "idle_watts": 2.0,
    "busy_watts": 6.0,
}


def save(path: Path, **changes: object) -> Path:
    """A profile in TOML; a field that is None is left out."""
    fields = {name: value for name, value in (BOARD | changes).items() if value is not None}
    file = path / "board.toml"
    file.write_bytes(b"".join(f"{name} = {json.dumps(value)}\n".encode() for name, value in fields.items()))
    return file


def test_shipped_profiles_parse() -> None:
    profiles = shipped_profiles()
    assert {"raspberry-pi-4", "raspberry-pi-5"} <= {profile.name for profile in profiles}
    assert len(profiles) == len(list(BOARDS.glob("*.toml")))
    for profile in profiles:
        assert profile.busy_watts > profile.idle_watts
        assert all(profile.sources)


def test_a_profile_reads_back(tmp_path: Path) -> None:
    assert msgspec.to_builtins(read_profile(save(tmp_path))) == BOARD


def test_whole_numbers_are_numbers_too(tmp_path: Path) -> None:
    assert read_profile(save(tmp_path, idle_watts=2, weight_bytes_per_second=5_000_000_000)).idle_watts == 2.0


def test_cost_of_a_draft() -> None:
    """A token reads every weight once: 50 MB at 5 GB/s take 10 ms, at 4 W above idle 40 mJ."""
    profile = msgspec.convert(BOARD, Profile)
    assert profile.draft_milliseconds(50_000_000) == pytest.approx(10.0)
    assert profile.draft_joules(50_000_000) == pytest.approx(0.04)
    assert profile.draft_joules(0) == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cores", 0),
        ("cores", "four"),
        ("cores", 2.5),
        ("idle_watts", 0.0),
        ("busy_watts", -1.0),
        ("weight_bytes_per_second", 0),
        ("origin", "guessed"),
        ("sources", []),
        ("sources", "a meter"),
        ("title", 5),
        ("colour", "green"),
        *((field, None) for field in BOARD),
    ],
)
def test_an_error_names_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    file = save(tmp_path, **{field: value})
    with pytest.raises(ProfileError, match=rf"{re.escape(str(file))} is not a profile: .*\b{field}\b"):
        read_profile(file)


def test_the_name_is_that_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="calls itself 'other'; name and file name must be the same"):
        read_profile(save(tmp_path, name="other"))


def test_a_board_that_draws_less_when_busy(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"busy_watts 1\.0 is below idle_watts 2\.0"):
        read_profile(save(tmp_path, busy_watts=1.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("idle_watts", "nan"),
        ("idle_watts", "inf"),
        ("busy_watts", "nan"),
        pytest.param("busy_watts", "inf"),
        pytest.param("weight_bytes_per_second", "inf"),
    ],
)
def test_a_figure_must_be_finite(tmp_path: Path, field: str, value: str) -> None:
    file = save(tmp_path)
    file.write_text(re.sub(rf"{field} = .*", f"{field} = {value}", file.read_text()))
    with pytest.raises(ProfileError, match=field):
        read_profile(file)


@pytest.mark.parametrize("where", ["", "nowhere.toml"])
def test_what_cannot_be_read(tmp_path: Path, where: str) -> None:
    with pytest.raises(ProfileError, match="cannot read the profile"):
        read_profile(tmp_path / where)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_garbage_is_a_profile_error(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "board.toml").write_bytes(contents)
    with pytest.raises(ProfileError, match=r"board\.toml"):
        read_profile(tmp_path / "board.toml")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [profile.name for profile in shipped_profiles()]


@pytest.mark.parametrize("profile", shipped_profiles(), ids=lambda profile: profile.name)
def test_show_as_json_is_the_profile(profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", profile.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == msgspec.to_builtins(profile)


def test_show_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "raspberry-pi-5"]) == 0
    out = capsys.readouterr().out
    for name in BOARD:
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    assert "10.5 to 13.9 W" in out


def test_show_with_weights_adds_modelled_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx.data").write_bytes(bytes(5_000_000))
    board = save(tmp_path)
    assert cli.main(["show", str(board), "--weights", str(tmp_path / "model.onnx.data"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["modelled_draft_milliseconds"], shown["modelled_draft_joules"]) == (1.0, 0.004)


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", *map(str, BOARDS.glob("*.toml")), str(save(tmp_path))]) == 0
    assert capsys.readouterr().out.count(": fine\n") == len(shipped_profiles()) + 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "abacus"], "no shipped profile 'abacus': there are raspberry-pi-4, "),
        (["show", "nowhere.toml"], "cannot read the profile nowhere.toml"),
        (["show", "raspberry-pi-5", "--weights", "nowhere"], "cannot read nowhere"),
        (["validate", "nowhere.toml"], "cannot read the profile nowhere.toml"),
    ],
)
def test_errors_are_a_sentence_and_exit_code_two(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"device-profile: {sentence}")


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "usage: device-profile" in capsys.readouterr().err
