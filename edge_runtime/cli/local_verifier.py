"""A verifier on this machine, in a process of its own, for commands that work without one elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from edge_runtime.protocol.errors import InputError, VerifierUnreachable

# Chosen: a limit for hangs. Importing torch and loading a target take seconds, on a busy machine two minutes.
VERIFIER_START_SECONDS = 600.0


def require_verifier_package() -> None:
    """Raise InputError if this installation has no verifier."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("cloud_verifier") is None:
        raise InputError('this runs the verifier here too: pip install "flexspec[cloud]"')


@contextlib.asynccontextmanager
async def cloud_verifier_process(*arguments: str) -> AsyncIterator[Process]:
    """Run `cloud-verifier` with these arguments; its input and output are pipes. It ends with the block.

    It is in a session of its own, so that Ctrl-C in the terminal does not end it before this process does; SIGTERM ends
    this process as SystemExit, and so both.
    """
    command = [sys.executable, "-m", "cloud_verifier.cli", *arguments]
    previous = signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_sigterm(number: int, _: FrameType | None) -> NoReturn:
    # The exit code that a shell gives a process which the signal killed.
    raise SystemExit(128 + number)


@contextlib.asynccontextmanager
async def run_verifier(target: Path) -> AsyncIterator[str]:
    """Run a verifier process for `target` on a free port of this machine; yield its URL.

    Raises:
        VerifierUnreachable: it did not start.
    """
    async with cloud_verifier_process("serve", str(target), "--port", "0") as process:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(VERIFIER_START_SECONDS):
                line = (await process.stdout.readline()).decode()
        except TimeoutError:
            line = ""
        if " on http" not in line:
            raise VerifierUnreachable(f"the verifier for {target} did not start; run `cloud-verifier serve {target}`")
        yield line.rsplit(" ", 1)[1].strip()
