"""Logging: to the systemd journal with structured fields if systemd runs the process, else to standard error.

On standard error, records are lines of text, or JSON objects for log collectors. What peers sent cannot pass for a
record of its own: text is escaped here (JSON escapes it by itself), and a traceback is indented.

Prompts and answers are logged only if the configuration asks for it (`[log] prompts`): code that would log one checks
`are_prompts_logged` first.
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
from typing import TextIO

from edge_runtime.common.terminal import escape, indent_lines

# The configured level applies to these packages. Others log warnings only: at a lower level some log every HTTP header,
# bearer tokens included.
PACKAGES = ("edge_runtime", "cloud_verifier", "device_profiles")
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
JOURNAL = Path("/run/systemd/journal/socket")
# Key of structured fields for the journal and for JSON: `log.info(..., extra={EXTRA_FIELDS: {...}})`.
EXTRA_FIELDS = "journal_fields"
# The kernel rejects datagrams above some 200 KB, so values are cut to this length.
MAX_FIELD_BYTES = 64 * 1024
SYSLOG_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
# A flag rather than a logger of its own, which any package that configures logging could enable.
_prompts = False


def configure(
    level: str,
    program: str,
    *,
    prompts: bool = False,
    form: str = "text",
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Configure logging from `level` on, one of `LEVELS`. May be called again.

    Args:
        program: the program's name in the journal.
        prompts: log prompts and answers, too.
        form: one of `FORMATS`; `json` writes one object per line to standard error, even under systemd.
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


def are_prompts_logged() -> bool:
    """Return whether prompts and answers may be logged."""
    return _prompts


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the journal in its native protocol, else to standard error."""

    def __init__(self, program: str, journal: Path | None, form: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_JsonFormatter() if form == "json" else TextFormatter())
        self._program = program
        self._journal = journal

    @property
    def stream(self) -> TextIO:
        """The present standard error: it may be replaced after logging is set up, and the old one closed."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        if self._journal is not None:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journal_socket:
                    journal_socket.sendto(journal_entry(record, self._program), str(self._journal))
                    return
            except OSError:
                # Standard error is connected to the journal, too.
                pass
        super().emit(record)


class TextFormatter(logging.Formatter):
    """Formats a record as one line of text, and a traceback as indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname} {record.name}: {_describe(record)}"


class _JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        fields = {name.lower(): value for name, value in getattr(record, EXTRA_FIELDS, {}).items()}
        return json.dumps(entry | fields, default=str)


def journal_entry(record: logging.LogRecord, program: str) -> bytes:
    """Encode `record` as a datagram of the journal's native protocol."""
    fields = {
        "MESSAGE": _describe(record),
        "PRIORITY": SYSLOG_PRIORITIES.get(record.levelno, 6),
        "SYSLOG_IDENTIFIER": program,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
        **{name: escape(str(value)) for name, value in getattr(record, EXTRA_FIELDS, {}).items()},
    }
    return b"".join(_encode_field(name, str(value)) for name, value in fields.items())


def _describe(record: logging.LogRecord) -> str:
    """Return the message on one line, and the traceback, if there is one, on indented lines."""
    message = escape(record.getMessage())
    if not record.exc_info:
        return message
    return indent_lines(f"{message}\n{logging.Formatter().formatException(record.exc_info)}")


def _encode_field(name: str, value: str) -> bytes:
    # The length prefix allows values of several lines.
    data = value.encode("utf-8", "replace")[:MAX_FIELD_BYTES]
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _is_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error still is the journal's stream that systemd opened: it may have been redirected since."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
