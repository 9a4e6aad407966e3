"""Reloads the configuration of a running service on SIGHUP.

Settings that can change without a restart change at once; the log names the others. A configuration with errors changes
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path

import msgspec

from edge_runtime.cli.draft_options import resolve_bundle
from edge_runtime.cli.planner_options import PLANNER_KEYS, make_planner, read_board_power
from edge_runtime.cli.serve_checks import check_limits, check_memory, make_access
from edge_runtime.cli.settings_options import read_settings
from edge_runtime.cli.verifier_client import read_token
from edge_runtime.common import logs
from edge_runtime.common.http_server import watch_reload_signal
from edge_runtime.common.sd_notify import Notifier
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.protocol.errors import FlexSpecError
from edge_runtime.service.app import Service
from edge_runtime.service.state import BoardRuntime
from edge_runtime.settings import SETTINGS, Settings, check_encryption

log = logging.getLogger(__name__)

FAILED_STATUS = "the configuration has errors, and the previous one is in use: see the log"


class ConfigurationReloader:
    """Applies the configuration again on SIGHUP.

    It catches the signal from its creation on; a reload has to wait until the draft is loaded.
    """

    def __init__(
        self, options: argparse.Namespace, settings: Settings, bundle: Path, service: Service, notifier: Notifier
    ) -> None:
        """
        Args:
            options: of `serve`; they override the configuration at every reload, too.
            settings, bundle: those in use.
        """
        self._options = options
        self._settings = settings.replace({"draft.bundle": bundle})
        self._service = service
        self._notifier = notifier
        self._failed = False
        self._requested = watch_reload_signal()

    def status(self) -> str:
        """Return the status for systemd: why no verifier can be used, the service's own, and a failed reload."""
        parts = [self._service.client.link_state.reason, self._service.metrics.status()]
        return "; ".join(filter(None, [*parts, FAILED_STATUS if self._failed else ""]))

    def errno(self) -> int:
        """Return why no verifier can be used, as an errno; 0 while one can."""
        problem = self._service.client.link_state.problem
        return problem.errno if problem else 0

    async def run(self, board: BoardRuntime) -> None:
        """Reload on every SIGHUP, until cancelled."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            self._notifier.reloading()
            try:
                board = await self._reload(board)
                self._failed = False
            except FlexSpecError as error:
                self._failed = True
                log.error("configuration not reloaded, the previous one stays in use: %s", error)
            except Exception:
                self._failed = True
                log.exception("configuration not reloaded, the previous one stays in use")
            self._notifier.ready(self.status())

    async def _reload(self, board: BoardRuntime) -> BoardRuntime:
        """Apply the configuration as it is now. If this raises, nothing has changed."""
        old = self._settings
        new = await asyncio.to_thread(self._read)
        changed = {key for key in SETTINGS if new.get(key) != old.get(key)}
        limits, keys = check_limits(self._options, new)
        token = read_token(new.verifier)
        # The URLs change only with a restart, so a new token would go to those of the start.
        urls = [endpoint.url for endpoint in self._service.client.endpoints]
        check_encryption(urls, has_token=bool(token), insecure=True)
        if new.service.max_concurrent > old.service.max_concurrent:
            check_memory(board.draft.manifest, new.service.max_concurrent - old.service.max_concurrent)
        planner = board.planner
        if changed & set(PLANNER_KEYS):
            # This discards what the old planner has learned about the verifiers, but not about the draft.
            planner = await asyncio.to_thread(make_planner, self._options, new.planner, board.draft)
            if isinstance(planner, AnalyticPlanner) and isinstance(board.planner, AnalyticPlanner):
                planner.restore(board.planner.state())
        board = msgspec.structs.replace(
            board,
            planner=planner,
            model=new.verifier.model,
            power=read_board_power(new.planner),
            on_link_loss=new.service.on_link_loss,
            tool_call_form=new.service.tool_call_form,
            reasoning_form=new.service.reasoning_form,
        )
        # Nothing below raises.
        logs.configure(new.log.level, "edge-runtime", prompts=new.log.prompts)
        self._service.reconfigure(limits, make_access(new.service, keys), board)
        self._service.client.deadline = new.verifier.deadline_seconds
        self._service.client.set_token(token)
        applied = sorted(key for key in changed if SETTINGS[key].spec.reloadable)
        self._settings = old.replace({key: new.get(key) for key in applied})
        log.info("configuration reloaded; changed: %s", ", ".join(applied) or "nothing")
        if pending := sorted(changed.difference(applied)):
            log.warning("these settings change only after a restart: %s", ", ".join(pending))
        return board

    def _read(self) -> Settings:
        settings = read_settings(self._options)
        return settings.replace({"draft.bundle": resolve_bundle(self._options, settings.draft)})
