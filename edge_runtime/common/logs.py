"""Where the log goes: the journal, with fields, where systemd runs the process; else standard error, for people, or as
JSON for whoever collects it.

No prompt and no answer is ever in it, unless the configuration says so (`[log] prompts`): who logs one asks first.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

# Ours. Other packages are asked for warnings only: at a lower level some write every header, tokens included.
PACKAGES = ("edge_runtime", "cloud_verifier", "device_profiles")
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
JOURNAL = Path("/run/systemd/journal/socket")
# Fields of a record that are for the journal, and for JSON: `log.info(..., extra={FIELDS: {...}})`.
FIELDS = "journal_fields"
# The kernel takes no datagrams of more than some 200 KB.
LONGEST = 64 * 1024
# Not a logger of their own: any package that configures logging could switch that on.
_prompts = False
SYSLOG = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def set_up(
    level: str,
    program: str,
    *,
    prompts: bool = False,
    form: str = "text",
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Logs from `level` on, one of `LEVELS`; may be called again.

    Args:
        program: its name in the journal.
        prompts: whether prompts and answers are logged, too.
        form: one of `FORMATS`; JSON goes to standard error, an object a line, whoever runs the process.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _Handler):
            root.removeHandler(handler)
    root.addHandler(_Handler(program, JOURNAL if _is_journal(environ) and form == "text" else None, form))
    root.setLevel(logging.WARNING)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level.upper())
    global _prompts
    _prompts = prompts
    logging.captureWarnings(True)


def prompts_wanted() -> bool:
    """Whether prompts and answers may be logged."""
    return _prompts


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """To the journal in its own protocol, else to standard error."""

    def __init__(self, program: str, journal: Path | None, form: str) -> None:
        super().__init__(sys.stderr)
        text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
        self.setFormatter(_Json() if form == "json" else text)
        self._program = program
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if self._journal is not None:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as telling:
                    telling.sendto(journal_entry(record, self._program), str(self._journal))
                    return
            except OSError:
                # Standard error is the journal, too.
                pass
        super().emit(record)


class _Json(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        fields = {name.lower(): value for name, value in getattr(record, FIELDS, {}).items()}
        return json.dumps(said | fields, default=str)


def journal_entry(record: logging.LogRecord, program: str) -> bytes:
    """`record` as a datagram of the journal's native protocol."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    fields = {
        "MESSAGE": message,
        "PRIORITY": SYSLOG.get(record.levelno, 6),
        "SYSLOG_IDENTIFIER": program,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
        **getattr(record, FIELDS, {}),
    }
    return b"".join(_field(name, str(value)) for name, value in fields.items())


def _field(name: str, value: str) -> bytes:
    # With its length in front a value may have lines.
    data = value.encode("utf-8", "replace")[:LONGEST]
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _is_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error goes to the journal: it may have been sent elsewhere since systemd opened it."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
