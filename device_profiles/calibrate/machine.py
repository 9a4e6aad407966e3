"""The machine under calibration: model, cores, load and memory bandwidth."""

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

# Larger than any cache, and small enough for a board with 512 MB of memory.
READ_BYTES = 256 << 20

Block = npt.NDArray[np.float64]
# Read kernels. The fastest one is limited by memory, not by arithmetic.
READ_KERNELS: tuple[Callable[[Block], object], ...] = (np.sum, np.max, lambda block: np.max(block.view(np.uint64)))


def count_cores() -> int:
    """Number of physical CPU cores."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def read_device_tree_model(root: Path = Path("/")) -> str:
    """The board's name from the device tree; empty without one, as on a PC."""
    return _text(root / "proc/device-tree/model").rstrip("\0")


def read_board_model(root: Path = Path("/")) -> str:
    """The board's name from the device tree, else the processor's name, else the architecture."""
    board = read_device_tree_model(root)
    processor = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return board or (processor[1] if processor else platform.machine())


def governor(root: Path = Path("/")) -> str:
    """The CPU frequency governor; empty if there is none."""
    return _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()


def load_average() -> float:
    """One-minute load average."""
    return psutil.getloadavg()[0]


def kernel() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def read_bandwidth(threads: int, seconds: float, tick: Callable[[], None]) -> float:
    """Memory read bandwidth of `threads` threads together, in bytes per second; takes about `seconds`.

    The best pass rather than the median: disturbances only slow a pass down, and the limit of the memory is wanted.
    """
    size = min(READ_BYTES, psutil.virtual_memory().available // 4)
    blocks = np.array_split(np.ones(size // 8), threads)
    until, best = time.monotonic() + seconds, 0.0
    with ThreadPoolExecutor(threads) as pool:
        while best == 0.0 or time.monotonic() < until:
            for kernel_function in READ_KERNELS:
                started = time.perf_counter()
                list(pool.map(kernel_function, blocks))
                best = max(best, size / (time.perf_counter() - started))
            tick()
    return best


def busy(seconds: float, tick: Callable[[], None]) -> None:
    """Keep all cores busy for about `seconds`."""
    matrix = np.ones((384, 384), np.float32)
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(count_cores()) as pool:
        while time.monotonic() < until:
            list(pool.map(lambda _: matrix @ matrix, range(8 * count_cores())))
            tick()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
