"""Options that constrain the generated text: `edge-runtime generate` and `cloud-verifier generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_runtime.common.options import add_option
from edge_runtime.protocol.errors import InputError


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Add --json-schema, --regex and --grammar, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    add_option(group, "--json-schema FILE", "write JSON that matches the schema in this file", type=Path)
    add_option(group, "--regex REGEX", "write a text that matches this regular expression as a whole", type=str)
    add_option(group, "--grammar FILE", "write a text that matches the grammar in this file, GBNF or Lark", type=Path)


def read_grammar(options: argparse.Namespace) -> str:
    """Return `Sampling.grammar` for the options of `add_grammar_options`; empty if none is given.

    Raises:
        InputError: a file cannot be read, or does not hold what the option says.
    """
    if options.json_schema is None and options.regex is None and options.grammar is None:
        return ""
    # Slow to import.
    from edge_runtime.protocol import grammar_sources

    if options.regex is not None:
        return grammar_sources.from_regex(options.regex)
    file, convert = (
        (options.json_schema, grammar_sources.from_json_schema)
        if options.json_schema is not None
        else (options.grammar, grammar_sources.from_grammar)
    )
    try:
        return convert(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
