"""Watches whether a verifier can be reached while no one asks, and logs why not."""

from __future__ import annotations

import asyncio
import logging
import time

from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import LinkState

log = logging.getLogger(__name__)

# All chosen. Interval at which the state is looked at, which costs nothing on the link.
PERIOD_SECONDS = 1.0
# Pause between two checks of a verifier that cannot be reached: the first, doubled up to the last. And the silence
# after which a reachable one is checked: 300 bytes of payload each, which a metered link can bear every five minutes.
FIRST_CHECK_SECONDS, LAST_CHECK_SECONDS = 1.0, 300.0
IDLE_CHECK_SECONDS = 300.0
# Pause between two log lines about a verifier that stays unreachable, or becomes so again: the first, doubled up to the
# last.
FIRST_LOG_SECONDS, LAST_LOG_SECONDS = 60.0, 3600.0


class LinkMonitor:
    """Checks the verifiers of one client at start, while they cannot be reached, and when nothing was sent for long."""

    def __init__(self, client: VerifierClient) -> None:
        self._client = client
        self._next_check = 0.0
        self._check_pause = FIRST_CHECK_SECONDS
        # The state of the last log line, when the next line about an unreachable verifier is due, and the pause after.
        self._logged = LinkState(None)
        self._next_log = 0.0
        self._log_pause = FIRST_LOG_SECONDS

    async def run(self) -> None:
        """Check and log until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(PERIOD_SECONDS)

    async def step(self) -> None:
        """Check the verifiers if that is due, and log what has changed."""
        if time.monotonic() >= self._next_check:
            await self._client.check()
            self._schedule_check()
        self._log_state()

    def _schedule_check(self) -> None:
        if self._client.link_state.reachable:
            self._check_pause = FIRST_CHECK_SECONDS
            self._next_check = time.monotonic() + IDLE_CHECK_SECONDS
        else:
            self._next_check = time.monotonic() + self._check_pause
            self._check_pause = min(2 * self._check_pause, LAST_CHECK_SECONDS)

    def _log_state(self) -> None:
        state, now = self._client.link_state, time.monotonic()
        if state.reachable:
            # Answers show that the verifier works: no check is needed until they cease.
            answered = max(endpoint.answered_at or 0.0 for endpoint in self._client.endpoints)
            self._next_check = max(self._next_check, answered + IDLE_CHECK_SECONDS)
            if self._logged.problem is not None:
                log.info("the verifier answers again, after %.0f s", time.time() - self._logged.problem.since)
                self._logged = state
            if now >= self._next_log:
                self._log_pause = FIRST_LOG_SECONDS
        elif state.problem is not None:
            if self._logged.problem is None:
                # A request found it unreachable: do not wait for the check of an idle link.
                self._next_check = min(self._next_check, now + self._check_pause)
            if now >= self._next_log:
                log.warning("%s", state.reason)
                self._logged = state
                self._next_log = now + self._log_pause
                self._log_pause = min(2 * self._log_pause, LAST_LOG_SECONDS)
