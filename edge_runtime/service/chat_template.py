"""Renders a conversation into the text that the target model continues: the tokenizer's chat template, or a plain one.

The template is read from the bundle, as Hugging Face stores it: `chat_template.jinja`, else `chat_template` in
`tokenizer_config.json`. Without one, a conversation is rendered as

    System: Be brief.

    User: What is a draft?

    Assistant:

and the answer ends before a line that begins with `User:`. A model that was not trained on conversations continues
this as it would any other text.
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
    """Renders conversations.

    Attributes:
        stop_strings: strings that end an answer, in addition to those of the request.
    """

    def __init__(self, render: Callable[[Conversation], str], stop_strings: list[str]) -> None:
        self.stop_strings = stop_strings
        self._render = render

    def render(self, messages: Conversation) -> str:
        """Return the text to continue. Raises InputError if the template rejects the conversation."""
        return self._render(messages)


def load_chat_template(bundle: Path) -> ChatTemplate:
    """Load the chat template of a bundle, or the plain one. Raises BundleCorrupt if the template does not parse."""
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
        # Older checkpoints have several templates by name.
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return ChatTemplate(_render_plain, PLAIN_STOPS)
    special = {name: _token_text(config[name]) for name in ("bos_token", "eos_token", "pad_token") if config.get(name)}
    return ChatTemplate(_compile(source, special, bundle), [])


def _compile(source: str, special: dict[str, str], bundle: Path) -> Callable[[Conversation], str]:
    # Imported here, because boards whose bundle has no template save its memory.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    # The same environment as in transformers, so that templates render the same.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise BundleCorrupt(f"the chat template in {bundle} does not parse: {error}; copy the bundle again") from None

    def render(messages: Conversation) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **special)
        except Exception as error:  # evaluating a template can raise any exception
            raise InputError(f"the chat template rejects this conversation: {error}") from None

    return render


def _render_plain(messages: Conversation) -> str:
    turns = [f"{PLAIN_ROLES[message['role']]}: {message['content']}\n\n" for message in messages]
    return "".join(turns) + "Assistant:"


def _token_text(token: Any) -> str:
    """Return the text of a special token, which may be a string or an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters, which is not what models were trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
