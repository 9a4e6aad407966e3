"""Which version a new session gets: aliases, canaries, rollback and retirement, as values."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.registry.catalog import MAX_ALIAS_HISTORY, Catalog, TargetVersion, UnknownVersion
from edge_runtime.protocol.errors import InputError

START = datetime(2026, 11, 22, tzinfo=UTC)
KEYS = [f"key-{index:06}" for index in range(4000)]


def target_version(name: str, digits: str = "a", minutes: int = 0, admitted: str = "shared") -> TargetVersion:
    return TargetVersion(f"{name}@{digits * 12}", name, "adapter", admitted, START + timedelta(minutes=minutes))


def catalog_of(count: int) -> Catalog:
    catalog = Catalog()
    for index in range(count):
        catalog = catalog.add(target_version(f"v{index}", minutes=index))
    return catalog


FOUR = catalog_of(4)
V = [target.version for target in FOUR.targets]


def test_the_default_alias_leads_to_the_first_version_until_another_is_promoted() -> None:
    assert FOUR.resolve("", "key") == FOUR.resolve("latest", "key") == V[0]
    assert [FOUR.traffic_shares(version) for version in V] == [{"latest": 100.0}, {}, {}, {}]


def test_names_and_exact_versions_bypass_aliases() -> None:
    catalog = FOUR.promote("latest", "v3", START).canary("latest", "v1", 100, START)
    assert {catalog.resolve("", key) for key in KEYS[:50]} == {V[1]}
    assert {catalog.resolve(V[2], key) for key in KEYS[:50]} == {V[2]}
    assert {catalog.resolve("v0", key) for key in KEYS[:50]} == {V[0]}


def test_a_name_resolves_to_its_latest_active_version() -> None:
    newer = target_version("v1", "b", minutes=60)
    assert FOUR.add(newer).resolve("v1", "key") == newer.version
    assert FOUR.add(newer).retire(newer.version, START).resolve("v1", "key") == V[1]


@pytest.mark.parametrize("model", ["v9", "v0@bbbbbbbbbbbb", "stable", "@", "x" * 5000, "../v1"])
def test_an_unknown_version_error_lists_the_available_ones(model: str) -> None:
    with pytest.raises(UnknownVersion, match=f"latest, {V[0]}") as caught:
        FOUR.resolve(model, "key")
    assert len(str(caught.value)) < 400


@settings(max_examples=25)
@given(percent=st.floats(1, 99), alias=st.sampled_from(["latest", "stable"]))
def test_a_canary_gets_its_share_of_new_sessions_deterministically(percent: float, alias: str) -> None:
    catalog = FOUR.promote(alias, "v0", START).canary(alias, "v1", percent, START)
    chosen = [catalog.resolve(alias, key) for key in KEYS]
    assert chosen == [catalog.resolve(alias, key) for key in KEYS]
    assert set(chosen) <= {V[0], V[1]}
    # Five standard deviations of the share.
    assert abs(chosen.count(V[1]) / len(KEYS) - percent / 100) < 5 * 0.5 / len(KEYS) ** 0.5
    full = catalog.canary(alias, "v1", 100, START)
    assert {full.resolve(alias, key) for key in KEYS[:100]} == {V[1]}
    assert {catalog.canary(alias, "v1", 0, START).resolve(alias, key) for key in KEYS[:100]} == {V[0]}


def test_a_growing_canary_keeps_its_sessions() -> None:
    small, large = (FOUR.canary("latest", "v1", percent, START) for percent in (5, 20))
    kept = [key for key in KEYS if small.resolve("", key) == V[1]]
    assert 100 < len(kept) < 300
    assert all(large.resolve("", key) == V[1] for key in kept)


def test_several_canaries_get_at_most_all_sessions_together() -> None:
    catalog = FOUR.canary("latest", "v1", 30, START).canary("latest", "v2", 20, START)
    chosen = [catalog.resolve("", key) for key in KEYS]
    assert [round(chosen.count(version) / len(KEYS), 1) for version in V] == [0.5, 0.3, 0.2, 0.0]
    assert catalog.traffic_shares(V[0]) == {"latest": 50.0}
    with pytest.raises(InputError, match="110 %"):
        catalog.canary("latest", "v3", 60, START)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("promote"), st.sampled_from(V)),
        st.tuples(st.just("canary"), st.sampled_from(V), st.floats(0, 100)),
    ),
    max_size=MAX_ALIAS_HISTORY,
)


@settings(max_examples=60)
@given(changes=CHANGES)
def test_rollback_restores_each_earlier_state_exactly(changes: list[tuple[object, ...]]) -> None:
    states = [FOUR]
    for minute, (change, version, *percent) in enumerate(changes):
        now = START + timedelta(minutes=minute)
        try:
            if change == "promote":
                states.append(states[-1].promote("latest", str(version), now))
            else:
                states.append(states[-1].canary("latest", str(version), float(str(percent[0])), now))
        except InputError:
            continue
        states[-1].validate()
    while len(states) > 1:
        catalog = states.pop()
        assert catalog.rollback("latest") == states[-1]
    with pytest.raises(InputError, match="nothing to roll back to"):
        states[0].rollback("latest")


def test_the_history_of_an_alias_is_bounded() -> None:
    catalog = FOUR
    for index in range(3 * MAX_ALIAS_HISTORY):
        catalog = catalog.promote("latest", V[index % 4], START)
    assert len(catalog.aliases["latest"].before) == MAX_ALIAS_HISTORY


def test_a_served_version_cannot_retire_and_a_retired_one_cannot_be_served() -> None:
    for catalog in (FOUR, FOUR.canary("latest", "v1", 1, START)):
        for version in (V[0], *catalog.aliases["latest"].now.canary):
            with pytest.raises(InputError, match="promote another version first"):
                catalog.retire(version, START)
    catalog = FOUR.promote("latest", "v1", START).retire("v0", START)
    assert catalog.find_exact(V[0]).retired == START
    assert catalog.resolve(V[0], "key") == V[0]  # for a lost session that continues
    with pytest.raises(UnknownVersion):
        catalog.resolve("v0", "key")
    with pytest.raises(InputError, match="add it again"):
        catalog.rollback("latest")
    with pytest.raises(InputError, match="retired"):
        catalog.promote("stable", V[0], START)
    readded = catalog.add(target_version("v0", minutes=90))
    assert readded.rollback("latest").resolve("", "key") == V[0]


def test_an_unshared_version_is_served_only_on_request() -> None:
    catalog = FOUR.add(target_version("odd", admitted="unshared"))
    assert catalog.resolve("odd", "key") == f"odd@{'a' * 12}"
    for change in (
        functools.partial(catalog.promote, "latest", "odd", START),
        functools.partial(catalog.canary, "latest", "odd", 5, START),
    ):
        with pytest.raises(InputError, match="--unshared"):
            change()
        assert change(unshared=True).traffic_shares(f"odd@{'a' * 12}")


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 81, "a/b", "ü", "a\nb"])
def test_names_unfit_for_files_and_urls_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="name"):
        FOUR.add(target_version(name))
    with pytest.raises(InputError, match="name"):
        FOUR.promote(name, "v1", START)


def test_ambiguous_names_and_invalid_changes_are_refused() -> None:
    with pytest.raises(InputError, match="alias already"):
        FOUR.add(target_version("latest"))
    with pytest.raises(InputError, match="cannot be an alias"):
        FOUR.promote("v2", "v1", START)
    with pytest.raises(InputError, match="already"):
        FOUR.canary("latest", "v0", 5, START)
    for percent in (-1, 101, float("nan")):
        with pytest.raises(InputError, match="0 to 100"):
            FOUR.canary("latest", "v1", percent, START)
    with pytest.raises(UnknownVersion, match="no alias"):
        FOUR.canary("stable", "v1", 5, START)
    with pytest.raises(UnknownVersion, match="no alias"):
        FOUR.rollback("stable")
