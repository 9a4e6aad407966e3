"""A watchdog over the whole suite: nothing of ours may hold an event loop for long.

Whatever a server does on its event loop, all of its clients wait for, `/healthz` included. So every callback of every
event loop in the process of the tests is measured: by the processor time of its thread, which does not depend on what
else the machine does. What tests and their fixtures do on a loop themselves does not count; nor does collecting
garbage, whose cost is that of all modules of the test process (servers freeze theirs: see `memory.freeze_objects`).

A program that tests start as a process of its own is watched if they start it as
`python -m tests.event_loop_watchdog MODULE ARGUMENT...` instead of `python -m MODULE ARGUMENT...`. uvloop, on which
`cloud-verifier serve` runs, cannot be watched; the verifiers in the process of the tests run the same code.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import msgspec
import pytest

# The limit of issue 19: far below what a person notices, and a tenth of the time limit of `/healthz`.
# An emulated processor takes longer, and may (`make test-arm`).
LIMIT_SECONDS = float(os.environ.get("FLEXSPEC_WATCHDOG_LIMIT", "0.02"))
# Set it to have the stack of whatever holds a loop in the report; costs a thread that samples.
STACKS_VARIABLE = "FLEXSPEC_WATCHDOG_STACKS"
# Names the file to which programs under test append what held their event loops.
FILE_VARIABLE = "FLEXSPEC_WATCHDOG_FILE"
SAMPLING_SECONDS = 0.005
STACK_DEPTH = 12
ROOT = Path(__file__).resolve().parents[1]
# What begins in the code of these counts: our packages, and what the HTTP server calls them through. All else is the
# tests' own: their coroutines and fixtures, and the clients, browsers and portals that they use.
SERVERS = (f"{ROOT}/edge_runtime/", f"{ROOT}/cloud_verifier/", "/granian/", "/starlette/")
# The coroutine of a command, which takes its options, does not count: until it is ready, it has no clients.
COMMAND_PARAMETER = "options"


class Hold(msgspec.Struct, frozen=True):
    """A callback that held its event loop.

    Attributes:
        seconds: processor time.
        where: the function, or the coroutine of the task.
        stack: where it was, if stacks are sampled.
    """

    seconds: float
    where: str
    stack: str = ""

    def __str__(self) -> str:
        hint = self.stack or f"(set {STACKS_VARIABLE}=1 to see where)"
        return f"{1e3 * self.seconds:.0f} ms of processor time in {self.where}\n{hint}"


class EventLoopWatchdog:
    """Measures the callbacks of all event loops of this process, except uvloop's.

    Args:
        file: where to report; None for `holds`.

    Attributes:
        holds: callbacks that took longer than `LIMIT_SECONDS` and have not been reported.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.holds: list[Hold] = []
        self._file = file
        self._local = threading.local()
        # By thread: when its current callback began, in the thread's processor time, and the last sampled stack.
        self._running: dict[int, float] = {}
        self._stacks: dict[int, str] = {}

    def install(self) -> None:
        """Measure from now on, until the process ends."""
        run, watchdog, clock = asyncio.Handle._run, self, time.thread_time

        def measured(handle: asyncio.Handle) -> None:
            local = watchdog._local
            outer, local.collecting = getattr(local, "collecting", 0.0), 0.0
            callback = handle._callback  # type: ignore[attr-defined]
            thread, started = threading.get_ident(), clock()
            watchdog._running[thread] = started
            try:
                run(handle)  # type: ignore[arg-type]
            finally:
                used = clock() - started - local.collecting
                watchdog._running.pop(thread, None)
                local.collecting = outer
                if used > LIMIT_SECONDS:
                    watchdog._report(callback, used, watchdog._stacks.pop(thread, ""))

        asyncio.Handle._run = measured  # type: ignore[method-assign,assignment]
        gc.callbacks.append(self._measure_collection)
        if os.environ.get(STACKS_VARIABLE):
            threading.Thread(target=self._sample, name="event-loop-watchdog", daemon=True).start()

    def _report(self, callback: Callable[..., Any], seconds: float, stack: str) -> None:
        code, name = _code_of(callback)
        file = code.co_filename if code else ""
        is_command = code is not None and "/cli/" in file and code.co_varnames[:1] == (COMMAND_PARAMETER,)
        if is_command or not any(server in file for server in SERVERS):
            return
        hold = Hold(seconds, f"{name} ({file})", stack)
        if self._file is None:
            self.holds.append(hold)
        else:
            with self._file.open("a") as output:
                output.write(f"{hold}\n")

    def _measure_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._local.collection_started = time.thread_time()
        else:
            started = getattr(self._local, "collection_started", None)
            if started is not None:
                self._local.collecting = getattr(self._local, "collecting", 0.0) + time.thread_time() - started

    def _sample(self) -> None:
        while True:
            time.sleep(SAMPLING_SECONDS)
            for thread, started in list(self._running.items()):
                used = time.clock_gettime(time.pthread_getcpuclockid(thread)) - started
                if used > LIMIT_SECONDS / 2:
                    self._stacks[thread] = _stack_of(thread)


def _stack_of(thread: int) -> str:
    """Return where a thread is: its innermost frames, the last one at the end."""
    places: list[tuple[CodeType, int]] = []
    # Collecting garbage within `_current_frames` deadlocks (CPython issue 106883). And CPython crashes on frames that a
    # thread has left, which goes on as soon as this one gives it the chance: so nothing is formatted yet.
    gc.disable()
    frame = sys._current_frames().get(thread)
    while frame is not None and len(places) < STACK_DEPTH:
        places.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    gc.enable()
    return "".join(f"  {code.co_filename}:{line} in {code.co_qualname}\n" for code, line in reversed(places))


def _code_of(callback: Callable[..., Any]) -> tuple[CodeType | None, str]:
    """Return the code and the name of what a callback runs: of a task, those of its outermost coroutine."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        coroutine: Any = owner.get_coro()
        # The tasks of anyio's task groups begin with a coroutine of anyio's that awaits the actual one.
        while "/anyio/" in getattr(getattr(coroutine, "cr_code", None), "co_filename", "") and coroutine.cr_await:
            coroutine = coroutine.cr_await
        code = getattr(coroutine, "cr_code", None) or getattr(coroutine, "gi_code", None)
        return code, getattr(coroutine, "__qualname__", repr(coroutine))
    function = getattr(callback, "func", callback)
    return getattr(function, "__code__", None), getattr(function, "__qualname__", repr(callback))


def _main() -> None:
    """Run a module as a program and append what held its event loops to the file."""
    EventLoopWatchdog(Path(os.environ[FILE_VARIABLE])).install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
else:
    WATCHDOG = EventLoopWatchdog()
    WATCHDOG.install()
    # In a parallel run, each process has a file of its own.
    HOLDS_FILE = Path(tempfile.mkstemp(prefix="flexspec-holds-")[1])
    os.environ[FILE_VARIABLE] = str(HOLDS_FILE)
    atexit.register(HOLDS_FILE.unlink, missing_ok=True)


@pytest.fixture(autouse=True)
def watch_event_loops() -> Iterator[None]:
    """Fail the test during which something held an event loop; it is then run once more (`pyproject.toml`)."""
    WATCHDOG.holds.clear()
    yield
    holds = [str(hold) for hold in WATCHDOG.holds]
    WATCHDOG.holds.clear()
    if HOLDS_FILE.stat().st_size:
        holds.append(HOLDS_FILE.read_text())
        HOLDS_FILE.write_text("")
    if holds:
        pytest.fail("an event loop was held:\n" + "\n".join(holds), pytrace=False)
