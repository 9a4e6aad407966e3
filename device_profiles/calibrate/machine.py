"""The machine that a calibration runs on: what it is, and how fast its cores read memory."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

# More than any cache holds, and little enough for a board with half a gigabyte of memory.
READ_BYTES = 256 << 20

Block = npt.NDArray[np.float64]
# How fast one reads depends on the instructions: the best of these is memory's speed, not arithmetic's.
WAYS: tuple[Callable[[Block], object], ...] = (np.sum, np.max, lambda block: np.max(block.view(np.uint64)))


def cores() -> int:
    """CPU cores, not counting threads that share one."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def model(root: Path = Path("/")) -> str:
    """The board's name from its device tree, else the processor's name, else the architecture."""
    board = _text(root / "proc/device-tree/model").rstrip("\0")
    processor = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return board or (processor[1] if processor else platform.machine())


def governor(root: Path = Path("/")) -> str:
    """The policy of CPU frequency; empty where the kernel has none."""
    return _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()


def load() -> float:
    """Programs that wanted to run during the last minute, on average."""
    return psutil.getloadavg()[0]


def kernel() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def read_bandwidth(threads: int, seconds: float, tick: Callable[[], None]) -> float:
    """Bytes per second at which `threads` threads together read memory: the best pass in about `seconds`.

    The best and not the median: whatever disturbs a pass only makes it slower, and memory's limit is asked for.
    """
    size = min(READ_BYTES, psutil.virtual_memory().available // 4)
    blocks = np.array_split(np.ones(size // 8), threads)
    until, best = time.monotonic() + seconds, 0.0
    with ThreadPoolExecutor(threads) as pool:
        while best == 0.0 or time.monotonic() < until:
            for way in WAYS:
                started = time.perf_counter()
                list(pool.map(way, blocks))
                best = max(best, size / (time.perf_counter() - started))
            tick()
    return best


def busy(seconds: float, tick: Callable[[], None]) -> None:
    """Keeps all cores computing for about `seconds`."""
    left = np.ones((384, 384), np.float32)
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(cores()) as pool:
        while time.monotonic() < until:
            list(pool.map(lambda _: left @ left, range(8 * cores())))
            tick()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
