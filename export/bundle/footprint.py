"""Measures memory and speed of a bundle on this machine, in a process of its own that loads it as a board does.

`python -m export.bundle.footprint BUNDLE THREADS` is that process. It imports only what a board imports.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import DraftError, FlexSpecError

PREFILL_TOKENS = 32
MAX_DECODED_TOKENS = 100
# Chosen: time limit of the measurement, for large drafts.
MAX_SECONDS = 6.0


class Footprint(msgspec.Struct, frozen=True):
    """Memory and speed of one bundle in one process.

    Attributes:
        threads: CPU threads of a step.
        resident_bytes: resident memory of the whole process after a short text; interpreter and libraries take some
            80 MB of it.
        own_bytes: the anonymous part of it; the rest are pages of files, which the kernel can drop and read again.
        peak_bytes: peak resident memory, which occurs while loading.
        milliseconds: median time per drafted token, sampling included, greedy.
        load_seconds: time from the start of loading to a usable draft.
    """

    threads: int
    resident_bytes: int
    own_bytes: int
    peak_bytes: int
    milliseconds: float
    load_seconds: float


def measure_footprint(bundle: Path, threads: int = 1) -> Footprint:
    """Measure `bundle` in a new process.

    Raises:
        DraftError: it does not load or run there.
    """
    command = [sys.executable, "-m", "export.bundle.footprint", str(bundle.resolve()), str(threads)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        # A negative exit code is a signal: -9 means that the machine ran out of memory.
        reason = done.stderr.strip().rsplit("\n", 1)[-1] or f"exit code {done.returncode}"
        raise DraftError(f"{bundle} cannot be measured: {reason}")
    return msgspec.json.decode(done.stdout, type=Footprint)


def measure_in_process(bundle: Path, threads: int) -> Footprint:
    """Measure `bundle` in this process, which should have done nothing else before. Raises as `OnnxDraft` does."""
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.protocol.sampling import Sampling

    started = time.perf_counter()
    draft = OnnxDraft.load(bundle, threads=threads, verify=False)
    loaded = time.perf_counter()
    context = draft.new_context()
    ids = [1] * min(PREFILL_TOKENS, context.limit // 2)
    context.prefill(ids)
    times: list[float] = []
    decoding_started = time.perf_counter()
    max_tokens = min(MAX_DECODED_TOKENS, context.limit - len(ids))
    while len(times) < max_tokens and time.perf_counter() - decoding_started < MAX_SECONDS:
        step_started = time.perf_counter()
        ids += context.propose(ids, 1, Sampling()).tokens
        times.append(time.perf_counter() - step_started)
    # The first tenth of the steps warms up.
    median = statistics.median(times[len(times) // 10 :])
    return Footprint(
        threads=threads,
        resident_bytes=_read_status_bytes("VmRSS"),
        own_bytes=_read_status_bytes("RssAnon"),
        peak_bytes=_read_status_bytes("VmHWM"),
        milliseconds=round(1e3 * median, 3),
        load_seconds=round(loaded - started, 3),
    )


def _read_status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> int:
    """Print the footprint as JSON. Returns the exit code."""
    try:
        print(msgspec.json.encode(measure_in_process(Path(sys.argv[1]), int(sys.argv[2]))).decode())
    except FlexSpecError as error:
        print_note(error)
        return error.exit_code
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())
