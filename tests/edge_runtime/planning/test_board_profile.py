"""Board profiles: the shipped ones, errors of invalid ones, and measured and modeled figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.board_profile import (
    BOARDS_DIRECTORY,
    BoardPower,
    BoardProfile,
    ProfileError,
    SourcedTable,
    cache_bytes,
    draft_sha256,
    read_profile,
    shipped_profiles,
    weight_bytes,
)
from edge_runtime.protocol.bundle import read_bundle
from tests.device_profiles.boards import BOARD, changed, save

NAMES = {"raspberry-pi-4", "raspberry-pi-5", "raspberry-pi-zero-2w", "jetson-orin-nano", "laptop", "server"}
SHIPPED = shipped_profiles()


def make_profile(**changes: Any) -> BoardProfile:
    return msgspec.structs.replace(msgspec.convert(BOARD, BoardProfile, strict=False), **changes)


def test_six_boards_are_shipped() -> None:
    assert {profile.name for profile in SHIPPED} == NAMES == {path.stem for path in BOARDS_DIRECTORY.glob("*.toml")}


@pytest.mark.parametrize("profile", SHIPPED, ids=lambda profile: profile.name)
def test_shipped_profiles_cite_sources(profile: BoardProfile) -> None:
    assert profile.origin == "published"
    assert profile.draft == []
    assert profile.power is not None
    tables: list[SourcedTable] = [profile.processor, profile.power]
    tables += [radio for radio in map(profile.radio.by_name, ("wifi", "ethernet", "lte", "5g")) if radio is not None]
    assert len(tables) >= 3
    for table in tables:
        assert table.origin in ("published", "derived")
        assert all(len(source) > 30 for source in table.sources)
        if table.origin == "published":
            assert any(re.search(r"20\d\d|\.com|\.lol", source) for source in table.sources)


def test_shipped_boards_rank_as_expected() -> None:
    speed = {profile.name: profile.draft_seconds(20_000_000, 0) for profile in SHIPPED}
    order = ["server", "laptop", "raspberry-pi-5", "raspberry-pi-4", "raspberry-pi-zero-2w"]
    assert sorted(order, key=speed.__getitem__) == order


def test_profile_round_trips(tmp_path: Path) -> None:
    profile = read_profile(save(tmp_path))
    assert msgspec.to_builtins(profile, str_keys=True) == BOARD
    (tmp_path / "board.toml").write_bytes(msgspec.toml.encode(profile))
    assert read_profile(tmp_path / "board.toml") == profile


def test_integers_are_accepted_as_floats(tmp_path: Path) -> None:
    power = read_profile(save(tmp_path, changed("power.idle_watts", 2))).power
    assert isinstance(power, BoardPower) and power.idle_watts == 2.0


def test_import_is_lightweight() -> None:
    program = "import sys, edge_runtime.planning.board_profile; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert not {"numpy", "onnxruntime", "rich", "httpx", "psutil"} & set(re.findall(r"'(\w+)'", modules))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "Board One"),
        ("title", ""),
        ("title", 5),
        ("origin", "guessed"),
        ("colour", "green"),
        ("processor", None),
        ("processor.cores", 0),
        ("processor.cores", "four"),
        ("processor.cores", 2.5),
        ("processor.cores", 10**60),
        ("processor.weight_bytes_per_second", 0),
        ("processor.weight_bytes_per_second", float("inf")),
        ("processor.weight_bytes_per_second", 10**400),
        ("processor.sources", []),
        ("processor.sources", "a stopwatch"),
        ("processor.origin", None),
        ("power.idle_watts", 0.0),
        ("power.idle_watts", float("nan")),
        ("power.busy_watts", -1.0),
        ("power.busy_watts", None),
        ("radio.lte.joules_per_byte_sent", -1e-9),
        ("radio.lte.tail", 3.0),
        ("radio.bluetooth", {}),
        ("sensors.pmic", "yes"),
        ("draft.0.sha256", "abc"),
        ("draft.0.milliseconds", {}),
        ("draft.1.threads", 0),
    ],
)
def test_error_names_file_field_and_remedy(tmp_path: Path, path: str, value: object) -> None:
    file = save(tmp_path, changed(path, value))
    with pytest.raises(ProfileError) as caught:
        read_profile(file)
    field = re.sub(r"\.(\d+)", r"[\1]", path)
    remedy = "add it|remove it|correct it"
    assert re.fullmatch(
        rf"{re.escape(str(file))} is not a valid profile: {re.escape(field)}\b.*({remedy}).*", str(caught.value)
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("power.busy_watts", 1.0, "power: busy_watts 1.0 is below idle_watts 2.0"),
        ("draft.1.threads", 1, "two [[draft]] tables have the same bundle and number of threads"),
        ("draft.0.milliseconds", {"zero": 1.0}, "draft[0].milliseconds"),
        ("name", "other", "the name 'other' in "),
    ],
)
def test_contradicting_fields_are_rejected(tmp_path: Path, path: str, value: object, message: str) -> None:
    with pytest.raises(ProfileError, match=re.escape(message)):
        read_profile(save(tmp_path, changed(path, value)))


def test_invalid_toml_is_located_by_line(tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    file.write_text('name = "board"\ntitle = \n')
    with pytest.raises(ProfileError, match=r"board\.toml is not valid TOML: .*line 2, column 9.*correct it there"):
        read_profile(file)


@pytest.mark.parametrize("where", ["", "nowhere.toml"])
def test_unreadable_file(tmp_path: Path, where: str) -> None:
    with pytest.raises(ProfileError, match=r"cannot read the profile .*; `device-profile list` lists"):
        read_profile(tmp_path / where)


TOML_VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        st.dates(),
        st.text(st.characters(blacklist_categories=["Cs"]), max_size=8),
        st.sampled_from(["published", "measured", "board"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("az.5", max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
PATHS = [
    "name",
    "processor",
    "processor.cores",
    "power.idle_watts",
    "radio",
    "radio.lte",
    "draft",
    "draft.0.milliseconds",
]
quick = settings(max_examples=150)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode(errors="replace"))))
@quick
def test_arbitrary_bytes_raise_profile_error(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "board.toml").write_bytes(contents)
    with pytest.raises(ProfileError, match=r"board\.toml"):
        read_profile(tmp_path / "board.toml")


@pytest.mark.slow
@given(st.sampled_from(PATHS), TOML_VALUES)
@quick
def test_wrong_value_anywhere_raises_profile_error(tmp_path: Path, path: str, value: object) -> None:
    file = save(tmp_path, changed(path, value))
    try:
        assert isinstance(read_profile(file), BoardProfile)
    except ProfileError as error:
        assert str(file) in str(error)


@pytest.mark.slow
@given(st.text('[]{}"=.#\n az0_-', max_size=80))
@quick
def test_nearly_valid_toml_raises_profile_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "board.toml"
    file.write_text(tomli_w.dumps(BOARD) + text)
    try:
        read_profile(file)
    except ProfileError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = 1" + "0" * 5000, "a" * 100_000])
def test_input_that_exhausts_the_parser_raises_profile_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "board.toml"
    file.write_text(text)
    with pytest.raises(ProfileError, match=r"board\.toml"):
        read_profile(file)


def test_unmeasured_draft_is_modeled_from_bandwidth() -> None:
    """A token reads all weights once: 50 MB at 5 GB/s take 10 ms, and 40 mJ at 4 W above idle."""
    profile = make_profile()
    assert profile.find_measurement(50_000_000, 0) is None
    assert profile.draft_seconds(50_000_000) == pytest.approx(0.010)
    assert profile.draft_seconds(50_000_000, 1000, cache_bytes=5000) == pytest.approx(0.011)
    assert profile.draft_joules(50_000_000) == pytest.approx(0.040)
    # 200 tokens times 50 MB at 20 GB/s; a single token takes at least a decode step.
    assert profile.prefill_seconds(50_000_000, 200) == pytest.approx(0.5)
    assert profile.prefill_seconds(50_000_000, 1) == pytest.approx(0.010)
    assert profile.prefill_seconds(50_000_000, 0) == 0.0


def with_threads(profile: BoardProfile, threads: int) -> BoardProfile:
    """Return the profile with the measurements of this number of threads alone."""
    return msgspec.structs.replace(profile, draft=[entry for entry in profile.draft if entry.threads == threads])


def test_measured_draft_uses_its_measurements() -> None:
    profile = make_profile()
    assert with_threads(profile, 1).draft_seconds(9_000_000, 66) == pytest.approx(0.0025)
    assert with_threads(profile, 4).draft_seconds(9_000_000, 1116) == pytest.approx(0.006)
    # Without a number of threads, the faster measurement at that context.
    assert profile.draft_seconds(9_000_000, 16) == pytest.approx(0.001)
    assert profile.draft_seconds(9_000_000, 1116) == pytest.approx(0.005)
    # 4 W measured, 2 W idle; no watts were measured with 4 threads, so the busy draw of 6 W applies.
    assert with_threads(profile, 1).draft_joules(9_000_000, 16) == pytest.approx(0.004)
    assert with_threads(profile, 4).draft_joules(9_000_000, 16) == pytest.approx(0.004)
    assert profile.prefill_seconds(9_000_000, 1000) == pytest.approx(0.2)
    # An unmeasured number of threads is modeled.
    assert with_threads(profile, 2).draft_seconds(9_000_000, 16) == pytest.approx(9e6 / 5e9)


@pytest.mark.slow
@given(
    st.dictionaries(st.integers(1, 10_000), st.floats(1e-3, 1e3), min_size=1, max_size=6),
    st.lists(st.integers(0, 20_000), min_size=2, max_size=2).map(sorted),
)
@quick
def test_interpolation_stays_within_the_measurements(times: dict[int, float], contexts: list[int]) -> None:
    rising = dict(zip(sorted(times), sorted(times.values()), strict=True))
    speed = msgspec.structs.replace(make_profile().draft[0], milliseconds=rising)
    early, late = speed.seconds(contexts[0]), speed.seconds(contexts[1])
    assert early <= late * (1 + 1e-12)
    assert min(rising.values()) * (1 - 1e-12) <= 1e3 * early and 1e3 * late <= max(rising.values()) * (1 + 1e-12)
    for context, milliseconds in rising.items():
        assert speed.seconds(context) == pytest.approx(milliseconds / 1e3)


def test_transfers_cost_bytes_and_time() -> None:
    profile = make_profile()
    assert profile.transfer_joules("lte", 1000, 2000, 2.0) == pytest.approx(0.004 + 0.001 + 3.0)
    assert profile.transfer_joules("lte", 0, 0, 0.0) == 0.0


def test_unknown_figures_are_none() -> None:
    profile = make_profile(power=None)
    assert profile.draft_joules(50_000_000) is None
    assert profile.transfer_joules("5g", 1, 1, 1.0) is None


def test_bundle_is_identified_by_weights_without_tokenizer(family: Path) -> None:
    manifest = read_bundle(family / "bundle", verify=False).manifest
    files = {name: record for name, record in manifest.files.items() if name != "tokenizer.json"}
    assert weight_bytes(manifest) == sum((family / "bundle" / name).stat().st_size for name in files)
    assert draft_sha256(manifest) == draft_sha256(msgspec.structs.replace(manifest, files=files))
    other = {name: msgspec.structs.replace(record, sha256="0" * 64) for name, record in files.items()}
    assert draft_sha256(manifest) != draft_sha256(msgspec.structs.replace(manifest, files=other))
    # 2 layers, 1 head, 64 values of 4 bytes, keys and values.
    assert cache_bytes(manifest) == 2 * 1 * 64 * 4 * 2
