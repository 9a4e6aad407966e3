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
        # The first version of cgroups has a hierarchy for each controller.
        return (cgroups / "memory").is_dir()


def limit_own_memory(share: float = SERVICE_SHARE) -> int:
    """Bound this process to a share of the machine's memory; return the bound in bytes.

    The bound is on private writable memory (RLIMIT_DATA), which is what a process can take from others. An allocation
    beyond it fails: onnxruntime reports that and the target goes on without the draft, Python raises MemoryError.
    RLIMIT_AS would also count files that are only mapped, such as libraries and the weights of the draft.
    """
    limit = int(share * psutil.virtual_memory().total)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit
