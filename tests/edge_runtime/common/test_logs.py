"""The log: lines for people, entries with fields for the journal, and no prompts."""

from __future__ import annotations

import datetime
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, pathlib, sys
from edge_runtime.common import logs
logs.JOURNAL = pathlib.Path(sys.argv[1])
logs.configure(sys.argv[2], "edge-runtime")
logs.configure(sys.argv[2], "edge-runtime", form=sys.argv[3])
log = logging.getLogger("edge_runtime.service")
log.debug("in detail")
log.info("two\\nlines", extra={logs.EXTRA_FIELDS: {"FLEXSPEC_TOKENS": 7}})
logging.getLogger("httpx").info("a header")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
"""


def run(tmp_path: Path, level: str, *, journal: bool, form: str = "text") -> str:
    """Run the program above and return its standard error."""
    with (tmp_path / "stderr").open("w+") as stderr:
        status = os.fstat(stderr.fileno())
        environ = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not journal)}"}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "journal"), level, form]
        subprocess.run(command, stderr=stderr, env=environ, check=True, timeout=300)
        stderr.seek(0)
        return stderr.read()


def parse(datagram: bytes) -> dict[str, str]:
    """An entry of the journal's native protocol, where every value has its length in front."""
    fields = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        (length,) = struct.unpack_from("<Q", rest)
        fields[name.decode()] = rest[8 : 8 + length].decode()
        assert rest[8 + length : 9 + length] == b"\n"
        datagram = rest[9 + length :]
    return fields


def test_lines_for_programs(tmp_path: Path) -> None:
    first, second, third = map(json.loads, run(tmp_path, "debug", journal=True, form="json").splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("debug", "edge_runtime.service", "in detail")
    assert datetime.datetime.fromisoformat(first["time"]).tzinfo is not None
    assert (second["message"], second["flexspec_tokens"]) == ("two\nlines", 7)
    assert "ZeroDivisionError" in third["exception"]


@pytest.mark.parametrize(("level", "first"), [("debug", "DEBUG edge_runtime.service: in detail"), ("error", "ERROR ")])
def test_lines_for_people(tmp_path: Path, level: str, first: str) -> None:
    said = run(tmp_path, level, journal=False)
    assert said.startswith(first)
    # Once each, and from our packages only.
    assert said.count("broke") == 1 and "ZeroDivisionError" in said and "a header" not in said


def test_entries_for_the_journal(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(300)
        assert run(tmp_path, "info", journal=True) == ""
        info, broke = parse(journal.recv(1 << 18)), parse(journal.recv(1 << 18))
    assert (info["MESSAGE"], info["PRIORITY"], info["FLEXSPEC_TOKENS"]) == (r"two\nlines", "6", "7")
    assert (info["LOGGER"], info["SYSLOG_IDENTIFIER"]) == ("edge_runtime.service", "edge-runtime")
    assert broke["PRIORITY"] == "3" and broke["MESSAGE"].startswith("broke\n  Traceback")


def test_without_a_journal_after_all(tmp_path: Path) -> None:
    assert "INFO edge_runtime.service: two" in run(tmp_path, "info", journal=True)
