"""The test bed: a verifier in the cloud, the local service on the board, and the middlebox between them, as processes.

The caller's thread must be inside the board's namespace (`network.inside("board")`) to reach the service.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from tests.conftest import FAMILY
from tests.emulator.control import ControlledProcess
from tests.emulator.middlebox import FaultCounts, FaultRates
from tests.emulator.network import ADDRESSES, Network

TARGET = FAMILY / "target-v1"
BUNDLE = FAMILY / "bundle"
VERIFIER_PORT, BOX_PORT, BOARD_PORT = 8500, 8600, 8400
VERIFIER = f"http://{ADDRESSES['cloud']}:{VERIFIER_PORT}"
BOX = f"http://{ADDRESSES['cloud']}:{BOX_PORT}"
START_SECONDS = 60.0

ProcessName = Literal["verifier", "board"]


class ProcessUsage(msgspec.Struct, frozen=True):
    """Resources of a process: resident bytes and number of open files."""

    resident: int
    files: int

    @classmethod
    def from_pid(cls, pid: int) -> ProcessUsage:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        return cls(resident, len(list(Path(f"/proc/{pid}/fd").iterdir())))


class TestBed:
    """Starts, restarts and kills the processes. Use it as an async context manager, or with `start` and `stop`, in the
    main thread.

    Attributes:
        network: the link between board and cloud.
        url: URL of the board's service.
    """

    # Not a test class, although pytest would collect it by its name.
    __test__ = False

    url = f"http://127.0.0.1:{BOARD_PORT}"

    def __init__(self, network: Network) -> None:
        self.network = network
        self._processes: dict[ProcessName, subprocess.Popen[str]] = {}
        self._board_options: list[str] = []

    async def __aenter__(self) -> TestBed:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def start(self) -> None:
        """Start the verifier and the middlebox, and wait until both answer."""
        address = ADDRESSES["cloud"]
        box = [sys.executable, "-m", "tests.emulator.middlebox", address, str(BOX_PORT), VERIFIER, "5"]
        self._box = ControlledProcess(self.network.command("cloud", box))
        try:
            await self.start_verifier()
        except BaseException:
            self._box.stop()
            raise

    def stop(self) -> None:
        """Kill all processes."""
        for which in ("board", "verifier"):
            self.kill(which)
        self._box.stop()

    async def start_verifier(self) -> None:
        """Start the verifier and wait until it answers."""
        options = ["serve", str(TARGET), "--host", ADDRESSES["cloud"], "--port", str(VERIFIER_PORT), "--threads", "1"]
        command = self.network.command("cloud", [sys.executable, "-m", "cloud_verifier.cli", *options])
        await self._start("verifier", command)

    async def start_board(self, *options: str, box: bool = False) -> None:
        """Start the board's service and wait until it answers. `box`: it reaches the verifier through the middlebox."""
        verifier = BOX if box else VERIFIER
        self._board_options = ["serve", "--port", str(BOARD_PORT), "--verifier", verifier, "--insecure", *options]
        self._board_options += ["--bundle", str(BUNDLE), "--threads", "1"]
        await self.restart_board()

    async def restart_board(self) -> None:
        """Start the board's service with its last options, killing it first if it is running."""
        self.kill("board")
        module = [sys.executable, "-m", "edge_runtime.cli", *self._board_options]
        await self._start("board", self.network.command("board", module))

    def kill(self, which: ProcessName) -> None:
        """Kill a process with SIGKILL and wait until it has ended."""
        process = self._processes.pop(which, None)
        if process:
            process.kill()
            process.communicate()

    def usage(self, which: ProcessName) -> ProcessUsage:
        return ProcessUsage.from_pid(self._processes[which].pid)

    def set_fault_rates(self, rates: FaultRates) -> FaultCounts:
        """Set the fault rates of the middlebox, and return the counts of the faults injected so far."""
        return self._box.send(rates, FaultCounts)

    async def _start(self, which: ProcessName, command: list[str]) -> None:
        # Started in the main thread, because the process is killed when the thread that started it ends.
        process = self._processes[which] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await asyncio.to_thread(process.stdout.readline)
        if " on " not in line:
            raise RuntimeError(f"the {which} did not start: it ended with {process.wait(5)}")
