"""Memory of the process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import psutil

# Share of the machine's memory that the board's service may use, as MemoryMax= in its unit.
SERVICE_SHARE = 0.75
CGROUPS = Path("/sys/fs/cgroup")


def release_freed_memory() -> None:
    """Return memory that was freed to the system, where the C library can (glibc keeps it for later).

    A tokenizer takes twice its memory while it is loaded: for 151,000 tokens 110 MB, of which this returns 59.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
    Python raises MemoryError. What is reserved but unused by now, mostly the stacks of threads, is not counted: on
    x86-64 that is 150 MB of 280 MB, with 127 MB in use.
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
