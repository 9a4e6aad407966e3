"""Which version a new session gets: aliases, canaries and roll-back, as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.registry.catalog import MOST_BEFORE, Entry, Roster, Unknown
from edge_runtime.protocol.errors import InputError

START = datetime(2026, 11, 22, tzinfo=UTC)
KEYS = [f"key-{index:06}" for index in range(4000)]


def entry(name: str, digits: str = "a", minutes: int = 0, admitted: str = "shared") -> Entry:
    return Entry(f"{name}@{digits * 12}", name, "adapter", admitted, START + timedelta(minutes=minutes))


def roster_of(count: int) -> Roster:
    roster = Roster()
    for index in range(count):
        roster = roster.add(entry(f"v{index}", minutes=index))
    return roster


FOUR = roster_of(4)
V = [entry.version for entry in FOUR.targets]


def test_the_first_version_is_what_the_default_alias_leads_to_and_later_ones_wait() -> None:
    assert FOUR.resolve("", "key") == FOUR.resolve("latest", "key") == V[0]
    assert [FOUR.shares(version) for version in V] == [{"latest": 100.0}, {}, {}, {}]


def test_names_and_exact_versions_bypass_aliases() -> None:
    roster = FOUR.promote("latest", "v3", START).canary("latest", "v1", 100, START)
    assert {roster.resolve("", key) for key in KEYS[:50]} == {V[1]}
    assert {roster.resolve(V[2], key) for key in KEYS[:50]} == {V[2]}
    assert {roster.resolve("v0", key) for key in KEYS[:50]} == {V[0]}


def test_a_name_is_its_version_that_was_added_last() -> None:
    newer = entry("v1", "b", minutes=60)
    assert FOUR.add(newer).resolve("v1", "key") == newer.version
    assert FOUR.add(newer).retire(newer.version, START).resolve("v1", "key") == V[1]


@pytest.mark.parametrize("model", ["v9", "v0@bbbbbbbbbbbb", "stable", "@", "x" * 5000, "../v1"])
def test_what_is_not_there_is_said_with_what_is(model: str) -> None:
    with pytest.raises(Unknown, match=f"latest, {V[0]}") as caught:
        FOUR.resolve(model, "key")
    assert len(str(caught.value)) < 400


@settings(max_examples=25, deadline=None)
@given(percent=st.floats(1, 99), alias=st.sampled_from(["latest", "stable"]))
def test_a_canary_gets_its_share_of_new_sessions_and_the_same_ones_every_time(percent: float, alias: str) -> None:
    roster = FOUR.promote(alias, "v0", START).canary(alias, "v1", percent, START)
    chosen = [roster.resolve(alias, key) for key in KEYS]
    assert chosen == [roster.resolve(alias, key) for key in KEYS]
    assert set(chosen) <= {V[0], V[1]}
    # Five standard deviations of the share.
    assert abs(chosen.count(V[1]) / len(KEYS) - percent / 100) < 5 * 0.5 / len(KEYS) ** 0.5
    more = roster.canary(alias, "v1", 100, START)
    assert {more.resolve(alias, key) for key in KEYS[:100]} == {V[1]}
    assert {roster.canary(alias, "v1", 0, START).resolve(alias, key) for key in KEYS[:100]} == {V[0]}


def test_a_growing_canary_keeps_the_sessions_it_has() -> None:
    small, large = (FOUR.canary("latest", "v1", percent, START) for percent in (5, 20))
    kept = [key for key in KEYS if small.resolve("", key) == V[1]]
    assert 100 < len(kept) < 300
    assert all(large.resolve("", key) == V[1] for key in kept)


def test_several_canaries_share_and_cannot_have_more_than_all() -> None:
    roster = FOUR.canary("latest", "v1", 30, START).canary("latest", "v2", 20, START)
    chosen = [roster.resolve("", key) for key in KEYS]
    assert [round(chosen.count(version) / len(KEYS), 1) for version in V] == [0.5, 0.3, 0.2, 0.0]
    assert roster.shares(V[0]) == {"latest": 50.0}
    with pytest.raises(InputError, match="110 %"):
        roster.canary("latest", "v3", 60, START)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("promote"), st.sampled_from(V)),
        st.tuples(st.just("canary"), st.sampled_from(V), st.floats(0, 100)),
    ),
    max_size=MOST_BEFORE,
)


@settings(max_examples=60, deadline=None)
@given(changes=CHANGES)
def test_rolling_back_restores_exactly_what_was_before_change_by_change(changes: list[tuple[object, ...]]) -> None:
    states = [FOUR]
    for minute, (kind, version, *percent) in enumerate(changes):
        when = START + timedelta(minutes=minute)
        try:
            if kind == "promote":
                states.append(states[-1].promote("latest", str(version), when))
            else:
                states.append(states[-1].canary("latest", str(version), float(str(percent[0])), when))
        except InputError:
            continue
        states[-1].check()
    while len(states) > 1:
        roster = states.pop()
        assert roster.rollback("latest") == states[-1]
    with pytest.raises(InputError, match="from the beginning"):
        states[0].rollback("latest")


def test_the_past_is_kept_so_far_and_no_further() -> None:
    roster = FOUR
    for index in range(3 * MOST_BEFORE):
        roster = roster.promote("latest", V[index % 4], START)
    assert len(roster.aliases["latest"].before) == MOST_BEFORE


def test_what_an_alias_leads_to_cannot_retire_and_what_is_retired_leads_nowhere() -> None:
    for roster in (FOUR, FOUR.canary("latest", "v1", 1, START)):
        for version in (V[0], *roster.aliases["latest"].now.canary):
            with pytest.raises(InputError, match="promote another version first"):
                roster.retire(version, START)
    roster = FOUR.promote("latest", "v1", START).retire("v0", START)
    assert roster.entry(V[0]).retired == START
    assert roster.resolve(V[0], "key") == V[0]  # for a session that was lost and goes on
    with pytest.raises(Unknown):
        roster.resolve("v0", "key")
    with pytest.raises(InputError, match="add it again"):
        roster.rollback("latest")
    with pytest.raises(InputError, match="retired"):
        roster.promote("stable", V[0], START)
    again = roster.add(entry("v0", minutes=90))
    assert again.rollback("latest").resolve("", "key") == V[0]


def test_an_unshared_version_leads_no_board_astray_unless_that_is_meant() -> None:
    roster = FOUR.add(entry("odd", admitted="unshared"))
    assert roster.resolve("odd", "key") == f"odd@{'a' * 12}"
    for change in (lambda **said: roster.promote("latest", "odd", START, **said),
                   lambda **said: roster.canary("latest", "odd", 5, START, **said)):  # fmt: skip
        with pytest.raises(InputError, match="--unshared"):
            change()
        assert change(unshared=True).shares(f"odd@{'a' * 12}")


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 81, "a/b", "ü", "a\nb"])
def test_names_that_files_and_urls_could_not_carry_are_none(name: str) -> None:
    with pytest.raises(InputError, match="name"):
        FOUR.add(entry(name))
    with pytest.raises(InputError, match="name"):
        FOUR.promote(name, "v1", START)


def test_a_name_means_one_thing() -> None:
    with pytest.raises(InputError, match="alias already"):
        FOUR.add(entry("latest"))
    with pytest.raises(InputError, match="cannot be an alias"):
        FOUR.promote("v2", "v1", START)
    with pytest.raises(InputError, match="already"):
        FOUR.canary("latest", "v0", 5, START)
    for percent in (-1, 101, float("nan")):
        with pytest.raises(InputError, match="0 to 100"):
            FOUR.canary("latest", "v1", percent, START)
    with pytest.raises(Unknown, match="no alias"):
        FOUR.canary("stable", "v1", 5, START)
    with pytest.raises(Unknown, match="no alias"):
        FOUR.rollback("stable")
