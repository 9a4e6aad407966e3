"""`edge-runtime` in the process of the tests: a process of its own takes a second to import what is imported here."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping
from subprocess import CompletedProcess
from unittest import mock

from edge_runtime.cli.main import main


def run(*arguments: str, stdin: str = "", environ: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """Run `edge-runtime` with these arguments, and with `environ` added to the environment."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.dict(os.environ, environ or {}),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())
