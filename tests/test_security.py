"""SECURITY.md: each bound in its table is the one of the code."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import msgspec
import pytest

import cloud_verifier.cli.main
import edge_runtime.cli.main
from edge_runtime.settings.table import Settings

DOCUMENT = Path(__file__).resolve().parents[1] / "SECURITY.md"
BOUND = re.compile(r"^\| (?:board|verifier|both) \| [^|]+ \| `([^`]+)` \| ([^|]+) \|$", re.MULTILINE)
PARSERS = {"edge-runtime": edge_runtime.cli.main.build_parser, "cloud-verifier": cloud_verifier.cli.main.build_parser}
BOUNDS = dict(BOUND.findall(DOCUMENT.read_text()))


def value_of_setting(key: str) -> object:
    """The default of a key of the board's configuration."""
    value: object = msgspec.convert({}, Settings)
    for name in key.split("."):
        value = getattr(value, name)
    return value


def value_of_constant(path: str, name: str) -> object:
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


def value_of_option(words: list[str]) -> object:
    """The default of an option, whose words begin with the program and its commands."""
    program, *commands, option = words
    parser = PARSERS[program]()
    for command in commands:
        (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = subparsers.choices[command]
    return next(action.default for action in parser._actions if option in action.option_strings)


def test_the_table_has_a_row_for_each_bound() -> None:
    rows = DOCUMENT.read_text().partition("| end | bound |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) == len(BOUNDS) > 30


@pytest.mark.parametrize("setting", BOUNDS)
def test_a_bound_of_the_document_is_that_of_the_code(setting: str) -> None:
    if ": " in setting:
        value = value_of_constant(*setting.split(": "))
    elif " " in setting:
        value = value_of_option(setting.split())
    else:
        value = value_of_setting(setting)
    if value is None:
        assert not BOUNDS[setting].isdecimal(), "it depends on the machine"
    else:
        assert value == float(BOUNDS[setting])
