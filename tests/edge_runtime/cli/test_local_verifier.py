"""A verifier process of a command ends with it."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from tests.toy_family import FAMILY

# Its input stays open, so that it waits for jobs.
WAIT = """
import asyncio, sys
from edge_runtime.cli.local_verifier import cloud_verifier_process

async def wait():
    async with cloud_verifier_process("generate", sys.argv[1], "--jobs", "-") as process:
        print(process.pid, flush=True)
        await process.wait()

asyncio.run(wait())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_both_processes(number: signal.Signals, code: int) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-c", WAIT, str(FAMILY / "target-v1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert psutil.pid_exists(child)
        process.send_signal(number)
        assert process.wait(timeout=600) == code
    assert not psutil.pid_exists(child)
