"""Prompts from the command line, a file or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_runtime.protocol.errors import InputError

# Chosen: far more than the longest context holds.
MAX_PROMPT_BYTES = 16 << 20


def check_text(text: str, what: str = "the prompt") -> str:
    """Return `text` if it can be tokenized. Raises InputError: it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} is not UTF-8") from None
    return text


def read_file(path: Path) -> str:
    """Read a prompt from a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            return _decode(file.read(MAX_PROMPT_BYTES + 1))
    except OSError as error:
        raise InputError(f"cannot read the prompt: {error}") from None


def read_standard_input() -> str:
    """Read a prompt from standard input. Raises InputError."""
    return _decode(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1))


def _decode(content: bytes) -> str:
    if len(content) > MAX_PROMPT_BYTES:
        raise InputError(f"the prompt has more than {MAX_PROMPT_BYTES} bytes; shorten it")
    try:
        # Line ends as in text files.
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise InputError("the prompt is not UTF-8") from None
