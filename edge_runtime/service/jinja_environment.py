"""The Jinja environment of chat templates, equal to transformers' own (`utils/chat_template_utils.py`, 4.57 and 5).

Models are trained on what transformers renders, to the last space, so every setting here is one of theirs. Imported
only for bundles that have a template, because jinja2 takes memory.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: marks text to train on; rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it without ClassVar

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse one block. It is a call, as in transformers, so that variables set inside end with it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. It runs in a sandbox: without access to attributes of Python or to files.

    Raises:
        jinja2.TemplateError: it does not parse.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _format_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which is not what models were trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _format_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
