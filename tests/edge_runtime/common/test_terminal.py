"""Nothing foreign passes for our own text, or controls a terminal: in logs, on consoles, in errors of commands."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_runtime.cli.main import main
from edge_runtime.common.logs import TextFormatter
from edge_runtime.common.terminal import Escaped, escape, escape_json, new_console, print_line, print_note

ROOT = Path(__file__).resolve().parents[3]
# Clears the screen and sets the title; forges a line; shows text in reverse; begins an 8-bit escape sequence.
FOREIGN = "name\x1b[2J\x1b]0;title\x07\r\nERROR forged\u2028line \u202egnp.exe\u2066 \x9b31m\x00\x7f\ud800 é 語 👍🏽"
SAFE_END = " é 語 👍🏽"


def assert_harmless(text: str) -> None:
    """Assert that `text` is one line, as a terminal shows it, with what is harmless in FOREIGN."""
    assert all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in text), ascii(text)
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", text), ascii(text)
    assert SAFE_END in text


def test_json_for_a_terminal_is_harmless_and_means_the_same() -> None:
    value = {"text": FOREIGN, "tag": "\U000e0041"}
    text = escape_json(json.dumps(value, ensure_ascii=False))
    assert_harmless(text)
    assert json.loads(text) == value
    assert escape_json('{"a":\t1}\n') == '{"a":\t1}\n'


def test_harmful_characters_are_written_as_in_python() -> None:
    assert_harmless(escape(FOREIGN))
    assert escape("a\x1b[0m\nb\u202e\x9b") == r"a\x1b[0m\nb\u202e\x9b"
    assert escape("two\nlines\tand\x1b", keep="\n\t") == "two\nlines\tand\\x1b"
    # Joiners are part of emoji and of words.
    assert escape("👩‍💻 می‌خواهم") == "👩‍💻 می‌خواهم"
    # Every control character and every mark of direction that Unicode knows.
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        directed = unicodedata.bidirectional(character) in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
        if directed or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            assert escape(character).isascii() and escape(character).isprintable(), hex(code)


def test_a_record_of_the_log_is_one_line() -> None:
    record = logging.LogRecord("edge_runtime.service", logging.INFO, "", 0, "GET %s failed", (FOREIGN,), None)
    assert_harmless(TextFormatter().format(record))


def test_the_lines_of_a_traceback_pass_for_no_record() -> None:
    try:
        raise ValueError(FOREIGN)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    first, *others = TextFormatter().format(record).split("\n")
    assert first == "ERROR x: failed" and others[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in others)
    assert_harmless(others[-1])


def test_an_error_of_a_command_is_escaped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hostile = tmp_path / "a\x1b[2J\u202eb\nedge-runtime: all is well"
    assert main(["generate", "x", "--bundle", str(hostile)]) == 2
    stderr = capsys.readouterr().err
    assert r"a\x1b[2J\u202eb" in stderr and "\x1b" not in stderr and "\u202e" not in stderr
    assert sum(line.startswith("edge-runtime:") for line in stderr.splitlines()) == 1


def test_notes_and_lines_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(FOREIGN)
    print_note(f"two\n{FOREIGN.replace(chr(13) + chr(10), '')}")
    printed = capsys.readouterr()
    assert_harmless(printed.out.removesuffix("\n"))
    first, second = printed.err.removesuffix("\n").split("\n")
    assert first == "two" and second.startswith("  name")
    assert_harmless(second)


def test_a_console_escapes_tables_and_keeps_its_own_colors() -> None:
    file = io.StringIO()
    console = new_console(file=file, force_terminal=True, width=200, color_system="standard")
    table = Table("a")
    table.add_row(Text(FOREIGN.replace("\r\n", ""), style="red"))
    console.print(table)
    # Live displays bypass the hook of a console.
    plain = Console(file=file, force_terminal=True, width=200, color_system="standard")
    plain.print(Escaped(Text(FOREIGN.replace("\r\n", ""), style="red")))
    shown = file.getvalue()
    assert shown.count("\x1b[31m") >= 2 and shown.count(r"name\x1b[2J") == 2
    assert "\x1b[2J" not in shown and "\x9b" not in shown and "\u202e" not in shown


def test_no_command_prints_past_the_one_place() -> None:
    """Everything on standard error goes through `print_note`, every table through `new_console`."""
    for package in ("edge_runtime", "cloud_verifier", "export", "device_profiles"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "terminal.py":
                source = file.read_text()
                assert "file=sys.stderr)" not in source, f"{file}: use print_note"
                assert not re.search(r"(?<![\w.(])Console\((?!width)", source), f"{file}: use new_console"
