"""How the board does, once a second: gauges for the feed, and the joules that it drew."""

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
# After a longer pause nobody knows what the board drew meanwhile: it slept.
MAX_GAP_SECONDS = 10.0


class GaugeSampler:
    """Gauges, and the energy that nobody else adds up.

    Attributes:
        surroundings: what the probes know; None before the draft is loaded.
        power: what a board of this profile draws idle and busy; None where no profile says.
        joules: drawn since the start, by source; empty as long as nothing is known.
    """

    def __init__(self, feed: EventLog, totals: ServiceTotals, queue: AdmissionQueue, client: VerifierClient) -> None:
        self.surroundings: Callable[[], Surroundings] | None = None
        self.power: BoardPower | None = None
        self.joules: dict[Literal["sensor", "profile"], float] = {}
        self._feed = feed
        self._totals = totals
        self._queue = queue
        self._client = client
        self._last = time.monotonic()
        self._draft_seconds = totals.draft_seconds

    async def run(self) -> None:
        """Tells the feed once a second, until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            self._feed.add_gauges(self.take())

    def take(self) -> GaugeSample:
        """The gauges now; adds what the board drew since the last call to `joules`."""
        known = self.surroundings() if self.surroundings else Surroundings()
        energy, watts = self._draw(known)
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
            fault=totals.fault,
            rtt_seconds=known.rtt_seconds,
            joules=round(sum(self.joules.values()), 2) if self.joules else None,
            watts=watts,
            energy=energy,
            battery_joules=known.joules_left,
            battery_percent=known.battery_percent,
            on_battery=known.on_battery,
            celsius=known.celsius,
            throttled=known.throttled,
            metered=known.metered,
        )

    def _draw(self, known: Surroundings) -> tuple[Literal["", "sensor", "profile"], float | None]:
        """Counts the joules since the last call; their source, and the watts."""
        now, drafted = time.monotonic(), self._totals.draft_seconds
        seconds, busy = now - self._last, drafted - self._draft_seconds
        self._last, self._draft_seconds = now, drafted
        source: Literal["sensor", "profile"] = "sensor"
        watts = known.watts
        if watts is None and self.power is not None:
            # Several answers draft at once, and no processor is more than busy.
            share = min(1.0, busy / max(seconds, 1e-3))
            source, watts = "profile", self.power.idle_watts + share * (self.power.busy_watts - self.power.idle_watts)
        if watts is None:
            return "", None
        self.joules[source] = self.joules.get(source, 0.0) + watts * (seconds if seconds <= MAX_GAP_SECONDS else 0.0)
        return source, round(watts, 3)


def classify_privacy(url: str) -> Privacy:
    """Who can read on the way to `url`: nobody for one of two reasons, or everybody."""
    if is_in_clear(url):
        return "clear"
    return "tls" if url.lower().startswith("https:") else "loopback"
