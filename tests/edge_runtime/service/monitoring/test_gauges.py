"""Gauges: absent sensors, energy measured or modeled, and the privacy of the link."""

from __future__ import annotations

import json
from types import SimpleNamespace

import msgspec
import pytest

from edge_runtime.planning.board_profile import find_profile
from edge_runtime.planning.plan import Surroundings
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.monitoring import gauges
from edge_runtime.service.monitoring.event_log import EventLog
from edge_runtime.service.monitoring.events import GaugeSample
from edge_runtime.service.monitoring.gauges import GaugeSampler, classify_privacy
from edge_runtime.service.monitoring.prometheus import ServiceMetrics
from edge_runtime.service.monitoring.reporter import ServiceTotals
from edge_runtime.verifier.client import VerifierClient


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the sampler sees; `seconds` can be advanced."""
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds, time=lambda: clock.seconds)
    monkeypatch.setattr(gauges, "time", clock)
    return clock


async def sample_gauges(
    clock: SimpleNamespace,
    readings: Surroundings | None,
    profile: str = "",
    *,
    draft_seconds: float = 0.0,
    period_seconds: float = 2.0,
) -> tuple[GaugeSample, GaugeSampler]:
    """Return the sample of a period in which the board drafted for `draft_seconds`."""
    async with VerifierClient("https://verifier.example") as client:
        totals = ServiceTotals()
        sampler = GaugeSampler(EventLog(), totals, AdmissionQueue(1, 1), client)
        sampler.surroundings = None if readings is None else lambda: readings
        sampler.power = find_profile(profile).power if profile else None
        sampler.sample()
        clock.seconds += period_seconds
        totals.draft_seconds += draft_seconds
        return sampler.sample(), sampler


async def test_missing_sensors_are_absent_rather_than_zero(clock: SimpleNamespace) -> None:
    for readings in (None, Surroundings()):
        sample, sampler = await sample_gauges(clock, readings)
        assert sampler.joules == {}
        raw = json.loads(msgspec.json.encode(sample))
        absent = {
            "joules",
            "watts",
            "energy",
            "battery_joules",
            "battery_percent",
            "celsius",
            "throttled",
            "rtt_seconds",
        }
        assert not raw.keys() & absent
        assert raw["privacy"] == "tls"


async def test_energy_is_measured_by_sensors_or_else_modeled(clock: SimpleNamespace) -> None:
    readings = Surroundings(watts=7.0, battery_percent=63.0)
    sample, sampler = await sample_gauges(clock, readings, "raspberry-pi-5")
    assert (sample.watts, sample.energy, sample.battery_percent) == (7.0, "sensor", 63.0)
    assert sample.joules == 14.0
    assert set(sampler.joules) == {"sensor"}
    power = find_profile("raspberry-pi-5").power
    assert power is not None
    idle, _ = await sample_gauges(clock, Surroundings(), "raspberry-pi-5")
    half, sampler = await sample_gauges(clock, Surroundings(), "raspberry-pi-5", draft_seconds=1.0)
    busy, _ = await sample_gauges(clock, Surroundings(), "raspberry-pi-5", draft_seconds=50.0)
    async with VerifierClient("http://127.0.0.1:1") as client:
        page = ServiceMetrics(AdmissionQueue(1, 1), client, sampler).render().decode()
    assert f'flexspec_board_energy_joules_total{{source="profile"}} {sampler.joules["profile"]!r}\n' in page
    assert "flexspec_board_power_watts" not in page, "this metric is for sensors only"
    assert (idle.watts, busy.watts) == (power.idle_watts, power.busy_watts)
    assert half.watts == pytest.approx((power.idle_watts + power.busy_watts) / 2, abs=1e-3)
    assert (half.energy, set(sampler.joules)) == ("profile", {"profile"})


async def test_energy_is_not_counted_while_the_board_was_suspended(clock: SimpleNamespace) -> None:
    sample, _ = await sample_gauges(clock, Surroundings(watts=5.0), period_seconds=3600.0)
    assert sample.joules == 0.0


@pytest.mark.parametrize(
    ("url", "privacy"),
    [
        ("https://a.example", "tls"),
        ("http://127.0.0.1:1", "loopback"),
        ("http://a.example", "clear"),
        ("HTTPS://a", "tls"),
    ],
)
def test_privacy_of_the_link(url: str, privacy: str) -> None:
    assert classify_privacy(url) == privacy
