"""SIGHUP: the configuration is read again, and what can change while answers are written changes.

A configuration with errors changes nothing. What can only change with a new process is named in the log.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from typing import Any

import msgspec

from edge_runtime.cli import planner_options, verifier_options
from edge_runtime.cli.serve_limits import check_memory, keys_of, limits_of
from edge_runtime.common import logs
from edge_runtime.common.http_server import watch_reload_signal
from edge_runtime.common.sd_notify import Notifier
from edge_runtime.protocol.errors import FlexSpecError
from edge_runtime.service.app import Service
from edge_runtime.service.state import BoardRuntime
from edge_runtime.verifier.client import VerifierClient

log = logging.getLogger(__name__)

# Options that a planner is made from.
PLANNING = ("policy", "objective", "profile", "radio", "energy_budget")
# These change at once; the contents of the files, too, where the names stay.
AT_ONCE = {
    *PLANNING,
    *("max_concurrent", "max_waiting", "api_key_file"),
    *("model", "deadline", "token_file", "on_link_loss"),
    *("log_level", "log_prompts"),
}
FAILED = "the configuration has errors, and the one before is in use: see the log"


class Reloading:
    """What SIGHUP does, from the time this is made; before the draft is loaded it has to wait."""

    def __init__(
        self, options: argparse.Namespace, service: Service, client: VerifierClient, notifier: Notifier
    ) -> None:
        """
        Args:
            options: of `serve`; `options.reread` reads them, and the configuration, once more.
        """
        self._options = options
        self._service = service
        self._client = client
        self._notifier = notifier
        self._failed = False
        self._asked = watch_reload_signal()

    def status(self) -> str:
        """What the service does, and whether its configuration is another than the file's."""
        return self._service.metrics.status() + (f"; {FAILED}" if self._failed else "")

    async def run(self, board: BoardRuntime) -> None:
        """Reloads whenever it is asked, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._notifier.reloading()
            try:
                board = await self._reload(board)
                self._failed = False
            except FlexSpecError as error:
                self._failed = True
                log.error("not reloaded, everything stays as it was: %s", error)
            except Exception:
                self._failed = True
                log.exception("not reloaded, everything stays as it was")
            self._notifier.ready(self.status())

    async def _reload(self, board: BoardRuntime) -> BoardRuntime:
        """Puts the configuration as it is now into effect. Raises FlexSpecError, and then has changed nothing."""
        old = self._options
        new: argparse.Namespace = await asyncio.to_thread(old.reread)
        changed = {name for name, value in _values(new).items() if value != _values(old).get(name)}
        limits, keys, arguments = limits_of(new), keys_of(new), verifier_options.client_arguments(new)
        # The verifiers stay those of the start, whatever the configuration says now: a new token goes to them.
        here = [endpoint.url for endpoint in self._client.endpoints]
        verifier_options.check_private(here, bool(arguments["token"]), insecure=True)
        if new.max_concurrent > old.max_concurrent:
            check_memory(board.draft.manifest, new.max_concurrent - old.max_concurrent)
        planner = board.planner
        if changed & set(PLANNING):
            # What the old one has learned of the verifiers goes with it.
            planner = await asyncio.to_thread(planner_options.planner_of, new, board.draft)
        power = planner_options.power_of(new)
        # Nothing below fails.
        board = msgspec.structs.replace(
            board, planner=planner, model=new.model, power=power, on_link_loss=new.on_link_loss
        )
        logs.configure(new.log_level, "edge-runtime", prompts=new.log_prompts)
        self._service.reconfigure(limits, keys, board)
        self._client.deadline = arguments["deadline"]
        self._client.set_token(arguments["token"])
        for name in changed & AT_ONCE:
            setattr(old, name, getattr(new, name))
        log.info("the configuration was read again; new: %s", ", ".join(sorted(changed & AT_ONCE)) or "nothing")
        if later := sorted(changed - AT_ONCE):
            log.warning("new only after a restart: %s", ", ".join(later))
        return board


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """What a user can say; not the parsers and functions among the options."""
    kinds = (str, int, float, bool, list, os.PathLike, type(None))
    return {name: value for name, value in vars(options).items() if isinstance(value, kinds)}
