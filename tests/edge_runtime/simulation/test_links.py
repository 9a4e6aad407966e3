"""Modeled links: means and bounds, losses, schedules, and recordings."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation.links import (
    LINK_PRESETS,
    PRESET_NAMES,
    DeliveryOpportunities,
    LinkParameters,
    LinkPhase,
    RecordedLink,
    ScheduledLink,
    SteadyLink,
    count_packets,
    make_preset_link,
    parse_link,
    read_opportunities,
)

times = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(sorted).filter(lambda rising: rising[-1] > 0)


@pytest.mark.parametrize("name", LINK_PRESETS)
def test_a_preset_matches_its_parameters(name: str) -> None:
    parameters, link = LINK_PRESETS[name], make_preset_link(name, 1)
    both = [link.up(0.0, 75).seconds + link.down(0.0, 75).seconds for _ in range(20000)]
    transmission = 600 / parameters.up_rate + 600 / parameters.down_rate
    assert min(both) >= parameters.rtt_seconds - parameters.jitter_seconds
    if not parameters.loss:
        assert max(both) <= parameters.rtt_seconds + parameters.jitter_seconds + transmission + 1e-12
    assert mean(both) == pytest.approx(link.mean(75, 75), rel=0.02)


def test_a_lost_packet_is_delayed_by_its_timeout() -> None:
    link = SteadyLink(
        LinkParameters(
            name="lossy", radio="lte", rtt_seconds=0.3, jitter_seconds=0.0, up_rate=1e9, down_rate=1e9, loss=0.3
        ),
        0,
    )
    transfers = [link.up(0.0, 10) for _ in range(2000)]
    clean, once, twice = 0.15, 0.15 + 0.6, 0.15 + 0.6 + 1.2
    seconds = [transfer.seconds for transfer in transfers]
    for expected, share in ((clean, 0.7), (once, 0.21), (twice, 0.063)):
        found = sum(abs(second - expected) < 1e-6 for second in seconds) / len(seconds)
        assert found == pytest.approx(share, abs=0.05)
    assert all(transfer.lost == (transfer.seconds > 0.2) for transfer in transfers)


def test_schedules_change_at_phase_ends() -> None:
    links = [
        SteadyLink(
            LinkParameters(
                name=str(i), radio="wifi", rtt_seconds=0.1 * (i + 1), jitter_seconds=0.0, up_rate=1e9, down_rate=1e9
            ),
            0,
        )
        for i in range(2)
    ]
    once = ScheduledLink([LinkPhase(2.0, links[0]), LinkPhase(1.0, None), LinkPhase(3.0, links[1])])
    assert [round(once.up(now, 0).seconds, 3) for now in (0.0, 1.99, 3.01, 100.0)] == [0.05, 0.05, 0.1, 0.1]
    assert [once.available(now) for now in (1.0, 2.5, 3.5)] == [1.0, 3.0, 3.5]
    assert once.up(once.available(2.5), 0).seconds == pytest.approx(0.1)
    repeated = ScheduledLink([LinkPhase(2.0, links[0]), LinkPhase(1.0, None)], repeat=True)
    assert [repeated.available(now) for now in (2.5, 4.5, 5.5)] == [3.0, 4.5, 6.0]
    assert once.mean(0, 0) == pytest.approx(0.2)
    both = ScheduledLink([LinkPhase(2.0, links[0]), LinkPhase(1.0, None), LinkPhase(3.0, links[1])], repeat=True)
    assert both.mean(0, 0) == pytest.approx((2 * 0.1 + 3 * 0.2) / 5)


def test_the_bursty_link_is_bad_for_two_of_ten_seconds() -> None:
    link = make_preset_link("bursty", 0)
    for now, trip in ((0.0, 0.04), (7.9, 0.04), (8.1, 0.25), (9.9, 0.25), (10.1, 0.04), (1238.5, 0.25)):
        assert link.up(now, 0).seconds + link.down(now, 0).seconds == pytest.approx(trip, abs=1e-3)


def test_offline_never_comes_back() -> None:
    assert math.isinf(make_preset_link("offline", 0).available(3.0))


@given(times, st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3)), max_size=20))
def test_every_opportunity_is_used_once_and_none_before_its_time(
    recorded: list[int], packets: list[tuple[int, int]]
) -> None:
    opportunities = DeliveryOpportunities(recorded)
    period = recorded[-1] / 1e3
    # All pauses together last little more than a second, and there are at most 60 packets.
    cycles = math.ceil(1.1 / period) + 60
    every = [(cycle * period + time / 1e3) for cycle in range(cycles) for time in recorded]
    now, used = 0.0, 0
    for pause, count in packets:
        # Not on a whole millisecond, where rounding would decide.
        now += pause / 1e3 + 0.00037
        # Brute force: the first opportunity that is neither used nor past.
        while every[used] < now:
            used += 1
        used += count
        taken = opportunities.take(now, count)
        assert taken == pytest.approx(every[used - 1], abs=1e-6)


def test_a_small_recording(tmp_path: Path) -> None:
    up, down = tmp_path / "a.up", tmp_path / "a.down"
    up.write_text("10\n10\n50\n")
    down.write_text("20\n40\n")
    link = RecordedLink(read_opportunities(up), read_opportunities(down), propagation_seconds=0.005)
    # The first two packets pass at 10 ms, the third at 50; two more pass at 60, in the second cycle of the recording.
    assert link.up(0.0, 100).seconds == pytest.approx(0.010)
    assert link.up(0.001, 100).seconds == pytest.approx(0.009)
    assert link.up(0.002, 100).seconds == pytest.approx(0.048)
    assert link.up(0.003, 3000).seconds == pytest.approx(0.057)
    assert link.down(0.0, 10).seconds == pytest.approx(0.020)
    # Gaps of 10, 0 and 40 ms, then 20 and 20.
    assert link.mean(10, 10) == pytest.approx(0.010 + (100 + 1600) / 2 / 50 / 1e3 + 800 / 2 / 40 / 1e3)
    parsed = parse_link(f"mahimahi:{up}:{down}:10", 3)
    assert 0.005 <= parsed.up(0.0, 10).seconds <= 0.055 + 1e-9


@pytest.mark.slow
@given(times)
def test_the_mean_wait_is_that_of_random_arrivals(recorded: list[int]) -> None:
    grid = 2000
    period = recorded[-1] / 1e3
    waits = []
    for index in range(grid):
        now = (index + 0.5) / grid * period
        waits.append(DeliveryOpportunities(recorded).take(now, 1) - now)
    assert mean(waits) == pytest.approx(DeliveryOpportunities(recorded).mean_wait, abs=period / grid * 2)


@given(st.one_of(st.text(max_size=40), st.lists(st.integers(-5, 10**7)).map(lambda v: "\n".join(map(str, v)))))
def test_any_text_is_a_valid_trace_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "trace"
    path.write_text(text, encoding="utf-8")
    try:
        recorded = read_opportunities(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert recorded == sorted(recorded) and recorded[-1] > 0
        assert DeliveryOpportunities(recorded).take(1.0, 2) >= 1.0


@pytest.mark.parametrize("text", PRESET_NAMES[:-1])
def test_presets_are_links(text: str) -> None:
    assert parse_link(text, 0).up(0.0, 75).seconds > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "6g",
        "wifi,4g",
        "wifi:0,4g",
        "wifi:5",
        "wifi:x,4g",
        "offline",
        "4g:3,offline",
        "mahimahi:a",
        "mahimahi:a:b:5",
    ],
)
def test_malformed_links_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_link(text, 0)


def test_parsing_a_schedule() -> None:
    link = parse_link("wifi:20, offline:5 ,weak-4g", 0)
    assert link.available(22.0) == pytest.approx(25.0)
    assert link.radio == "wifi"


@given(st.integers(0, 10**6))
def test_packets_hold_1500_bytes(count: int) -> None:
    assert (count_packets(count) - 1) * 1500 < max(1, count) <= count_packets(count) * 1500
