"""Memory of the process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

import psutil

# Share of the machine's memory that the board's service may use, as MemoryMax= in its unit.
SERVICE_SHARE = 0.75
CGROUPS = Path("/sys/fs/cgroup")

# Parameters of mallopt() in glibc's malloc.h: free bytes at the end of the heap above which it shrinks, the size from
# which a block is mapped alone, and the number of heaps. Chosen: small, because answers allocate and free much, and
# glibc's own thresholds would grow and keep that memory.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
TRIM_BYTES, MMAP_BYTES, ARENAS = 1 << 17, 1 << 16, 2
# New objects after which the garbage collector looks through them. Chosen: Python's own 700 are made in one forward of
# a busy verifier; measured, with 512 streams a token takes a sixth less of its thread's time.
COLLECTED_OBJECTS = 20_000
# Seconds between two returns of freed memory to the system. Chosen: soon enough for other programs; a return takes a
# millisecond.
RELEASE_SECONDS = 15.0


def limit_heap_growth() -> None:
    """Make glibc return freed memory to the system early. Call at the start of a process that serves."""
    # The tokenizer would start a thread for each core, each with a heap of its own, to tokenize one text at a time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in (
            (M_TRIM_THRESHOLD, TRIM_BYTES),
            (M_MMAP_THRESHOLD, MMAP_BYTES),
            (M_ARENA_MAX, ARENAS),
        ):
            libc.mallopt(parameter, value)


def freeze_objects() -> None:
    """Exclude all existing objects from garbage collection, which otherwise stops every thread to scan them.

    Measured: 200 ms in a verifier, 30 ms on a laptop in the service of a board; 1 ms afterwards. New objects are looked
    through less often, too. Call it once everything that the process keeps is imported and loaded.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_OBJECTS, *gc.get_threshold()[1:])


def release_freed_memory() -> None:
    """Return memory that was freed to the system, where the C library can (glibc keeps it for later).

    A tokenizer takes twice its memory while it is loaded: for 151,000 tokens 110 MB, of which this returns 59.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def keep_releasing_memory() -> None:
    """Return freed memory to the system every RELEASE_SECONDS, until cancelled."""
    while True:
        await asyncio.sleep(RELEASE_SECONDS)
        await asyncio.to_thread(release_freed_memory)


def accounts_for_services(cgroups: Path = CGROUPS) -> bool:
    """Return whether the kernel accounts for the memory of services, so that MemoryMax= of a unit is a limit.

    Raspberry Pi OS starts its kernel with `cgroup_disable=memory`.
    """
    try:
        return "memory" in (cgroups / "cgroup.controllers").read_text().split()
    except OSError:
        # The first version of cgroups has a hierarchy for each controller; systemd makes its slices in those it uses.
        return (cgroups / "memory/system.slice").is_dir()


def limit_own_memory(share: float = SERVICE_SHARE) -> int:
    """Bound the memory of this process to a share of the machine's, now that it is loaded; return the bound in bytes.

    The bound is on private writable memory (RLIMIT_DATA): RLIMIT_AS would also count files that are only mapped, such
    as libraries. An allocation beyond it fails: onnxruntime reports that, and the target goes on without the draft;
    Python raises MemoryError. Memory that is reserved but not yet used, mostly stacks of threads, is not counted: 150
    MB of 280 MB on x86-64, where 127 MB are in use.
    """
    bound = int(share * psutil.virtual_memory().total)
    reserved, used = _read_data_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = reserved + max(0, bound - used)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    return bound


def _read_data_bytes() -> tuple[int, int]:
    """Return the private writable memory of this process, and the part of it that is in use."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    reserved, used = (int(fields[name].split()[0]) << 10 for name in ("VmData", "RssAnon"))
    return reserved, used
