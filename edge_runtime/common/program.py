"""The frame of a program's `main`: what goes wrong is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import FlexSpecError, InputError

# That of a shell for a process that SIGINT killed.
INTERRUPTED_EXIT_CODE = 130
# What a write to standard output fails with where it is a file: the disk or a quota is full, or the disk is broken.
OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def run_program(
    name: str, run: Callable[[], int], describe_missing: Callable[[ModuleNotFoundError], str] | None = None
) -> int:
    """Run a command and return its exit code, or that of the error that it raised.

    Args:
        name: of the program, which begins its messages.
        describe_missing: returns the message for a package that is not installed, or raises the error again.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code
    except FlexSpecError as error:
        print_note(f"{name}: {error}")
        return error.exit_code
    except ModuleNotFoundError as error:
        if describe_missing is None:
            raise
        print_note(f"{name}: {describe_missing(error)}")
        return InputError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # The reader of the output has closed it.
        _discard_output()
        return 0
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS:
            raise
        _discard_output()
        print_note(f"{name}: cannot write the output: {error.strerror}")
        return FlexSpecError.exit_code


@contextlib.contextmanager
def killed_by_sigint() -> Iterator[None]:
    """Let Ctrl-C end the process at once: imports that it interrupts may swallow the exception, or make it another."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _discard_output() -> None:
    """Without this, Python would fail to write what is left at exit, and report it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
