"""Samples the state of the board once a second and integrates the energy that it draws."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from edge_runtime.planning.board_profile import BoardPower
from edge_runtime.planning.plan import Surroundings
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.monitoring.event_log import EventLog
from edge_runtime.service.monitoring.events import GaugeSample, Privacy
from edge_runtime.service.monitoring.reporter import ServiceTotals
from edge_runtime.settings import is_in_clear
from edge_runtime.verifier import VerifierClient

PERIOD_SECONDS = 1.0
# After a longer gap between samples the board has been suspended, and its power draw meanwhile is unknown; chosen.
MAX_GAP_SECONDS = 10.0


class GaugeSampler:
    """Samples gauges.

    Attributes:
        surroundings: returns the current probe readings; None before the draft model is loaded.
        power: idle and busy power draw of a board of this profile; None if the profile does not say.
        joules: energy drawn since the start, by source; empty while nothing is known.
    """

    def __init__(
        self, event_log: EventLog, totals: ServiceTotals, queue: AdmissionQueue, client: VerifierClient
    ) -> None:
        self.surroundings: Callable[[], Surroundings] | None = None
        self.power: BoardPower | None = None
        self.joules: dict[Literal["sensor", "profile"], float] = {}
        self._event_log = event_log
        self._totals = totals
        self._queue = queue
        self._client = client
        self._last_sample = time.monotonic()
        self._last_draft_seconds = totals.draft_seconds

    async def run(self) -> None:
        """Append a sample to the event log every second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            self._event_log.append_gauges(self.sample())

    def sample(self) -> GaugeSample:
        """Return the current gauges, and add the energy drawn since the last call to `joules`."""
        readings = self.surroundings() if self.surroundings else Surroundings()
        energy, watts = self._integrate_energy(readings)
        totals, (sent, received) = self._totals, self._client.meter.total
        return GaugeSample(
            at=time.time(),
            running=self._queue.running,
            waiting=self._queue.waiting,
            tokens=totals.tokens,
            rounds=totals.rounds,
            drafts=totals.drafts,
            drafted=totals.drafted,
            accepted=totals.accepted,
            sent=sent,
            received=received,
            verifier=self._client.url,
            privacy=classify_privacy(self._client.url),
            fault=self._describe_fault(),
            version=totals.version,
            unverified=totals.unverified,
            unverified_answers=totals.unverified_answers,
            rtt_seconds=readings.rtt_seconds,
            joules=round(sum(self.joules.values()), 2) if self.joules else None,
            watts=watts,
            energy=energy,
            battery_joules=readings.joules_left,
            battery_percent=readings.battery_percent,
            on_battery=readings.on_battery,
            celsius=readings.celsius,
            throttled=readings.throttled,
            metered=readings.metered,
        )

    def _describe_fault(self) -> str:
        """Return why no verifier can be used, or why the last answer reached none; empty once one has answered."""
        link = self._client.link_state
        idle = not self._queue.running
        return link.reason or ("" if link.reachable and idle else self._totals.fault)

    def _integrate_energy(self, readings: Surroundings) -> tuple[Literal["", "sensor", "profile"], float | None]:
        """Add the energy since the last call to `joules`; return its source and the current power draw."""
        now, draft_seconds = time.monotonic(), self._totals.draft_seconds
        seconds, busy = now - self._last_sample, draft_seconds - self._last_draft_seconds
        self._last_sample, self._last_draft_seconds = now, draft_seconds
        source: Literal["sensor", "profile"] = "sensor"
        watts = readings.watts
        if watts is None and self.power is not None:
            # Several answers may draft at once, but the processor is never more than fully busy.
            share = min(1.0, busy / max(seconds, 1e-3))
            source, watts = "profile", self.power.idle_watts + share * (self.power.busy_watts - self.power.idle_watts)
        if watts is None:
            return "", None
        self.joules[source] = self.joules.get(source, 0.0) + watts * (seconds if seconds <= MAX_GAP_SECONDS else 0.0)
        return source, round(watts, 3)


def classify_privacy(url: str) -> Privacy:
    """Return how traffic to `url` is protected: encrypted, local to this machine, or not at all."""
    if is_in_clear(url):
        return "clear"
    return "tls" if url.lower().startswith("https:") else "loopback"
