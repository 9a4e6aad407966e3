"""The bound that a board's service sets itself where the kernel does not account for memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.common.memory import accounts_for_services
from tests.conftest import FAMILY

# Loads a draft, bounds the process to 200 MB, and lets it grow until it may not.
PROGRAM = """
import sys, psutil
from pathlib import Path
from edge_runtime.common.memory import _read_data_bytes, limit_own_memory
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol.errors import DraftError
from edge_runtime.protocol.sampling import Sampling

draft = OnnxDraft.load(Path(sys.argv[1]), threads=2)
bound = limit_own_memory(200e6 / psutil.virtual_memory().total)
context = draft.new_context()
assert len(context.propose([1, 2, 3], 8, Sampling()).tokens) == 8
blocks = []
try:
    while True:
        blocks.append(bytearray(b"x") * (1 << 20))
except MemoryError:
    pass
used = _read_data_bytes()[1]
assert 0.8 * bound < used <= 1.02 * bound, (used, bound)
failed = 0
try:
    draft.new_context().prefill([1] * draft.manifest.architecture.context)
except (DraftError, MemoryError) as error:
    failed = 1
blocks.clear()
assert len(context.propose([1, 2, 3, 4], 8, Sampling()).tokens) == 8
print("bounded", failed)
"""


@pytest.mark.slow
def test_a_process_that_bounds_itself_stays_below_and_lives_on() -> None:
    command = [sys.executable, "-c", PROGRAM, str(FAMILY / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bounded")


@pytest.mark.parametrize(
    ("files", "accounted"),
    [
        ({"cgroup.controllers": "cpuset cpu io memory pids\n"}, True),
        # Raspberry Pi OS: cgroup_disable=memory.
        ({"cgroup.controllers": "cpuset cpu io pids\n"}, False),
        # The first version of cgroups.
        ({"memory/system.slice/memory.limit_in_bytes": "9223372036854771712\n"}, True),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, False),
        ({"cpu/cpu.shares": "1024\n"}, False),
    ],
)
def test_whether_the_kernel_accounts_for_memory(files: dict[str, str], accounted: bool, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert accounts_for_services(tmp_path) is accounted
