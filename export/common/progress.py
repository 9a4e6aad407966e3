"""Progress of a long run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_LINES = 5.0


class Progress(AbstractContextManager["Progress"]):
    """Shows the steps done, a note such as the loss, and the remaining time.

    Args:
        label: name of the run.
        done: steps that an earlier run has done.
        shown: whether to print anything.
    """

    def __init__(self, label: str, total: int, done: int = 0, *, shown: bool = True) -> None:
        self._label, self._total, self._first, self._shown = label, total, done, shown
        self._started = self._printed = time.monotonic()
        self._bar: Callable[[int, str], None] | None = None
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def update(self, done: int, note: str) -> None:
        """Report that `done` steps are done."""
        if self._bar is not None:
            self._bar(done, note)
            return
        now = time.monotonic()
        if not self._shown or (done < self._total and now - self._printed < SECONDS_BETWEEN_LINES):
            return
        self._printed = now
        elapsed = now - self._started
        left = elapsed / max(1, done - self._first) * (self._total - done)
        print(f"{self._label}: {done}/{self._total}  {note}  {elapsed:.0f} s, {left:.0f} s left", flush=True)

    def change_total(self, total: int) -> None:
        """Expect another number of steps from now on."""
        self._total = total

    def _open_bar(self) -> None:
        from rich import progress

        columns = (
            "{task.description}",
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            "{task.fields[note]}",
            progress.TimeElapsedColumn(),
            "left",
            progress.TimeRemainingColumn(),
        )
        display = progress.Progress(*columns)
        task = display.add_task(self._label, total=self._total, completed=self._first, note="")
        display.start()
        self._bar = lambda done, note: display.update(task, completed=done, total=self._total, note=note)
        self._close = display.stop
