"""A verifier in the cloud, a board's service on the board, and the box between them: processes that can be killed.

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
from tests.emulator.control import Controlled
from tests.emulator.middlebox import Done, Mischief
from tests.emulator.network import ADDRESSES, Network

TARGET = FAMILY / "target-v1"
BUNDLE = FAMILY / "bundle"
VERIFIER_PORT, BOX_PORT, BOARD_PORT = 8500, 8600, 8400
VERIFIER = f"http://{ADDRESSES['cloud']}:{VERIFIER_PORT}"
BOX = f"http://{ADDRESSES['cloud']}:{BOX_PORT}"
START_SECONDS = 60.0

Which = Literal["verifier", "board"]


class Usage(msgspec.Struct, frozen=True):
    """What a process holds: resident bytes, and open files."""

    resident: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        return cls(resident, len(list(Path(f"/proc/{pid}/fd").iterdir())))


class Scene:
    """Use as an async context manager, or by `start` and `stop`, in the main thread.

    Attributes:
        network: the link between them.
        url: of the board's service.
    """

    url = f"http://127.0.0.1:{BOARD_PORT}"

    def __init__(self, network: Network) -> None:
        self.network = network
        self._processes: dict[Which, subprocess.Popen[str]] = {}
        self._board_options: list[str] = []

    async def __aenter__(self) -> Scene:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def start(self) -> None:
        """Starts the verifier and the box, and returns when they answer."""
        address = ADDRESSES["cloud"]
        box = [sys.executable, "-m", "tests.emulator.middlebox", address, str(BOX_PORT), VERIFIER, "5"]
        self._box = Controlled(self.network.command("cloud", box))
        try:
            await self.start_verifier()
        except BaseException:
            self._box.stop()
            raise

    def stop(self) -> None:
        """Kills them all."""
        for which in ("board", "verifier"):
            self.kill(which)
        self._box.stop()

    async def start_verifier(self) -> None:
        """Returns when it answers."""
        options = ["serve", str(TARGET), "--host", ADDRESSES["cloud"], "--port", str(VERIFIER_PORT), "--threads", "1"]
        command = self.network.command("cloud", [sys.executable, "-m", "cloud_verifier.cli", *options])
        await self._start("verifier", command)

    async def start_board(self, *options: str, box: bool = False) -> None:
        """Returns when it answers. `box`: it reaches the verifier through the middlebox only."""
        way = BOX if box else VERIFIER
        self._board_options = ["serve", "--port", str(BOARD_PORT), "--verifier", way, "--insecure", *options]
        self._board_options += ["--bundle", str(BUNDLE), "--threads", "1"]
        await self.restart_board()

    async def restart_board(self) -> None:
        """Kills it first, if it runs."""
        self.kill("board")
        module = [sys.executable, "-m", "edge_runtime.cli", *self._board_options]
        await self._start("board", self.network.command("board", module))

    def kill(self, which: Which) -> None:
        """SIGKILL; returns when it is gone."""
        process = self._processes.pop(which, None)
        if process:
            process.kill()
            process.communicate()

    def usage(self, which: Which) -> Usage:
        return Usage.of(self._processes[which].pid)

    def spoil(self, mischief: Mischief) -> Done:
        """What the middlebox does from now on; returns what it has done."""
        return self._box.order(mischief, Done)

    async def _start(self, which: Which, command: list[str]) -> None:
        # Started here, in the main thread: it dies with the thread that starts it.
        process = self._processes[which] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await asyncio.to_thread(process.stdout.readline)
        if " on " not in line:
            raise RuntimeError(f"the {which} did not start: it ended with {process.wait(5)}")
