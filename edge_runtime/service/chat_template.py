"""From a conversation to the text that the target continues: the tokenizer's chat template, or a plain one.

A template is looked for beside the draft, as Hugging Face stores it: `chat_template.jinja`, else `chat_template` in
`tokenizer_config.json`. Without one, a conversation is written as

    System: Be brief.

    User: What is a draft?

    Assistant:

and the answer ends before a line that begins with `User:`. A model that was not trained on conversations continues it
as any other text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.protocol.errors import BundleCorrupt, InputError

Conversation = list[dict[str, str]]

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
PLAIN_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
PLAIN_STOPS = ["\nUser:"]


class ChatTemplate:
    """How conversations are written.

    Attributes:
        stops: where an answer ends, beside what the request says.
    """

    def __init__(self, render: Callable[[Conversation], str], stops: list[str]) -> None:
        self.stops = stops
        self._render = render

    def text(self, messages: Conversation) -> str:
        """The text to continue. Raises InputError: the template does not take such a conversation."""
        return self._render(messages)


def load_chat_template(bundle: Path) -> ChatTemplate:
    """The chat template in the directory `bundle`, or the plain one. Raises BundleCorrupt if it does not parse."""
    config: dict[str, Any] = {}
    try:
        if (bundle / CONFIG_FILE).is_file():
            config = msgspec.json.decode((bundle / CONFIG_FILE).read_bytes(), type=dict[str, Any])
        source = config.get("chat_template")
        if (bundle / TEMPLATE_FILE).is_file():
            source = (bundle / TEMPLATE_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as error:
        raise BundleCorrupt(f"cannot read the chat template in {bundle}: {error}; copy the bundle again") from None
    if isinstance(source, list):
        # Several by name, as older checkpoints have them.
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return ChatTemplate(_plain, PLAIN_STOPS)
    special = {name: _content(config[name]) for name in ("bos_token", "eos_token", "pad_token") if config.get(name)}
    return ChatTemplate(_compile(source, special, bundle), [])


def _compile(source: str, special: dict[str, str], bundle: Path) -> Callable[[Conversation], str]:
    # Boards without a template need not hold this in memory.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise TemplateError(message)

    # As transformers sets it up, so that templates mean the same.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise BundleCorrupt(f"the chat template in {bundle} does not parse: {error}; copy the bundle again") from None

    def render(messages: Conversation) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **special)
        except Exception as error:  # a template can do anything that an expression can
            raise InputError(f"the chat template does not take this conversation: {error}") from None

    return render


def _plain(messages: Conversation) -> str:
    said = [f"{PLAIN_ROLES[message['role']]}: {message['content']}\n\n" for message in messages]
    return "".join(said) + "Assistant:"


def _content(token: Any) -> str:
    """A special token's text, which may be wrapped in an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes what HTML would mistake, which a model never saw.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
