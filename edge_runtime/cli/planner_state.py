"""Keeps what the planner has learned in a file across restarts.

The file holds counts of accepted tokens and no text. It is replaced atomically, and ignored if it is damaged, too old,
of another format or of another draft. A board that cannot write it learns anew after each start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from edge_runtime.common.files import lock_directory, write_atomically
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.plan import Planner
from edge_runtime.planning.planner_state import PlannerState

log = logging.getLogger(__name__)

FILE_NAME = "planner.json"
FILE_FORMAT: Final = 1
# All chosen. What was learned longer ago counts for nothing: targets and verifiers have changed since.
MAX_AGE_SECONDS = 30 * 86400.0
# A process that is killed loses at most this much; flash memory wears out with every write.
SAVE_INTERVAL_SECONDS = 60.0
# More than MAX_RECORDS records take.
MAX_FILE_BYTES = 1 << 20


class PlannerStateFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Contents of the file.

    Attributes:
        format: FILE_FORMAT.
        draft: identity of the draft (`board_profile.draft_sha256`).
        saved: Unix time.
    """

    format: Literal[1]
    draft: str
    saved: float
    state: PlannerState


class PlannerStateStore:
    """Loads and saves the state of one draft's planner. A disk that fails is logged once and otherwise ignored."""

    def __init__(self, directory: Path, draft: str, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            directory: created on the first save.
            draft: see `PlannerStateFile`.
            clock: returns the Unix time.
        """
        self.path = directory / FILE_NAME
        self._draft = draft
        self._clock = clock
        self._saved: PlannerState | None = None
        self._failed = False

    def restore(self, planner: Planner) -> bool:
        """Let `planner` continue from the file; return whether it could."""
        if not isinstance(planner, AnalyticPlanner):
            return False
        try:
            contents = self.path.read_bytes()
            if len(contents) > MAX_FILE_BYTES:
                raise msgspec.ValidationError("the file is too large")
            file = msgspec.json.decode(contents, type=PlannerStateFile)
        except FileNotFoundError:
            return False
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("the planner starts without what it had learned: %s: %s", self.path, error)
            return False
        # A board without a battery-backed clock may be in the past for a while; its file is not too old, then.
        if file.draft != self._draft or self._clock() - file.saved > MAX_AGE_SECONDS:
            return False
        planner.restore(file.state)
        self._saved = file.state
        return True

    def save(self, planner: Planner) -> None:
        """Replace the file, unless nothing has been learned since the last time. Call from the planner's thread."""
        if state := self._changed(planner):
            self._write(state)

    async def keep_saving(self, current: Callable[[], Planner]) -> None:
        """Save the state of the planner that `current` returns, at intervals, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_INTERVAL_SECONDS)
            if state := self._changed(current()):
                await asyncio.to_thread(self._write, state)

    def _changed(self, planner: Planner) -> PlannerState | None:
        """Return the planner's state if it differs from what was saved or restored last."""
        if not isinstance(planner, AnalyticPlanner):
            return None
        state = planner.state()
        return None if state == self._saved else state

    def _write(self, state: PlannerState) -> None:
        file = PlannerStateFile(FILE_FORMAT, self._draft, self._clock(), state)
        try:
            with lock_directory(self.path.parent):
                write_atomically(self.path, msgspec.json.encode(file))
        except OSError as error:
            if not self._failed:
                log.warning("cannot keep what the planner learns in %s: %s", self.path.parent, error.strerror or error)
            self._failed = True
        else:
            self._saved = state
