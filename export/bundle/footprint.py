"""What a bundle takes on this machine: a process of its own loads it as a board does, drafts, and tells.

`python -m export.bundle.footprint BUNDLE THREADS` is that process: it imports what a board imports and nothing more.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from edge_runtime.protocol.errors import DraftError, FlexSpecError

READ_TOKENS = 32
MOST_TOKENS = 100
# A large draft is measured for so long and no longer.
SECONDS = 6.0


class Footprint(msgspec.Struct, frozen=True):
    """One bundle in one process.

    Attributes:
        threads: CPU threads of a step.
        resident_bytes: of the whole process while it drafts behind a short text; interpreter and libraries are some
            80 MB of it.
        own_bytes: of that, what is not a file's pages, which the kernel can drop and read again.
        peak_bytes: the most that it ever was, while loading.
        milliseconds: median per drafted token, its choice included, greedy.
        load_seconds: from the process's own start of loading to a draft.
    """

    threads: int
    resident_bytes: int
    own_bytes: int
    peak_bytes: int
    milliseconds: float
    load_seconds: float


def measure(bundle: Path, threads: int = 1) -> Footprint:
    """Measures `bundle` in a process of its own.

    Raises:
        DraftError: it did not load or run there.
    """
    command = [sys.executable, "-m", "export.bundle.footprint", str(bundle.resolve()), str(threads)]
    home = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        # A signal's number, negative: -9 is what a machine out of memory does.
        words = done.stderr.strip().rsplit("\n", 1)[-1] or f"exit code {done.returncode}"
        raise DraftError(f"{bundle} cannot be measured: {words}")
    return msgspec.json.decode(done.stdout, type=Footprint)


def measure_here(bundle: Path, threads: int) -> Footprint:
    """Measures `bundle` in this process, which should have done nothing else before. Raises as `OnnxDraft` does."""
    from edge_runtime.draft.model import OnnxDraft
    from edge_runtime.protocol.sampling import Sampling

    started = time.perf_counter()
    draft = OnnxDraft.load(bundle, threads=threads, verify=False)
    loaded = time.perf_counter()
    context = draft.context()
    ids = [1] * min(READ_TOKENS, context.limit // 2)
    context.prefill(ids)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < min(MOST_TOKENS, context.limit - len(ids)) and time.perf_counter() - begun < SECONDS:
        before = time.perf_counter()
        ids += context.propose(ids, 1, Sampling()).tokens
        times.append(time.perf_counter() - before)
    resident, own, peak = (1024 * _kilobytes(field) for field in ("VmRSS", "RssAnon", "VmHWM"))
    # The first steps warm up.
    middle = statistics.median(times[len(times) // 10 :])
    return Footprint(threads, resident, own, peak, round(1e3 * middle, 3), round(loaded - started, 3))


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> int:
    """Prints the footprint as JSON. Returns the exit code."""
    try:
        print(msgspec.json.encode(measure_here(Path(sys.argv[1]), int(sys.argv[2]))).decode())
    except FlexSpecError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())
