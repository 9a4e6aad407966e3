"""Renders a conversation into the text that the target model continues: by the model's chat template, or a plain one.

The templates travel in the bundle (`bundle.ChatFormat`), and rendering is that of transformers' `apply_chat_template`.
Without one, a conversation is rendered as

    System: Be brief.

    User: What is a draft?

    Assistant:

and the answer ends before a line that begins with `User:`. A model that was not trained on conversations continues
this as it would any other text.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from edge_runtime.protocol.bundle import CHAT_FILE, ChatFormat, read_bundle, read_chat_format
from edge_runtime.protocol.errors import BundleCorrupt, InputError
from edge_runtime.service.prompt_tokenizer import encode_prompt

# Messages as in OpenAI's API; `arguments` of tool calls are objects.
Conversation = list[dict[str, Any]]

DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"
PLAIN_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
PLAIN_STOPS = ["\nUser:"]
# Marks where the last message ends in the rendered text; transformers'.
CONTINUATION_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a template is rendered with besides the messages; the names are those of `apply_chat_template`.

    Attributes:
        tools: JSON schemas of functions that the model may call.
        documents: texts for retrieval-augmented answers, each with `title` and `text`.
        add_generation_prompt: end with the start of the assistant's message.
        continue_final_message: end with the last message, unfinished.
        variables: further variables of the template, such as `enable_thinking`.
    """

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = {}


PLAIN_OPTIONS = ChatOptions()


class ChatTemplate:
    """Renders conversations.

    Attributes:
        is_plain: the model has no chat template.
        stop_strings: strings that end an answer, in addition to those of the request.
    """

    def __init__(self, chat: ChatFormat, bundle: Path) -> None:
        """
        Args:
            bundle: where `chat` comes from, for errors.

        Raises:
            BundleCorrupt: a template does not parse.
        """
        self._special_tokens = chat.special_tokens
        self._sources = chat.templates
        self._templates = {name: _compile(source, name, bundle) for name, source in chat.templates.items()}
        self.is_plain = not self._templates
        self.stop_strings = PLAIN_STOPS if self.is_plain else []

    @functools.cached_property
    def takes_system_message(self) -> bool:
        """Whether a conversation may begin with a system message."""
        try:
            self._render([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], PLAIN_OPTIONS)
        except InputError:
            return False
        return True

    def source(self, options: ChatOptions = PLAIN_OPTIONS) -> str:
        """Return the Jinja source of the template that is used with these options; empty for the plain form."""
        return "" if self.is_plain else self._sources[self._choose(options)]

    def render(self, messages: Conversation, options: ChatOptions = PLAIN_OPTIONS) -> str:
        """Return the text to continue.

        Raises:
            InputError: the template rejects the conversation, or the options contradict each other.
        """
        if options.continue_final_message:
            if options.add_generation_prompt:
                raise InputError(
                    "continue_final_message needs add_generation_prompt: false; a text goes on with one of them"
                )
            return self._render_unfinished(messages, options)
        return self._render(messages, options)

    def encode(self, tokenizer: Tokenizer, text: str, limit: int = 0) -> list[int]:
        """Return the ids of a rendered conversation.

        A template contains the special tokens. The plain form begins with those with which the tokenizer begins a text.

        Args:
            limit: see `encode_prompt`.

        Raises:
            PromptTooLong: see `encode_prompt`.
        """
        ids, added = encode_prompt(tokenizer, text, special=self.is_plain, limit=limit)
        end = len(ids)
        # The text goes on, so it does not end with what the tokenizer puts after a text.
        while self.is_plain and end and added[end - 1]:
            end -= 1
        return ids[:end]

    def _render(self, messages: Conversation, options: ChatOptions) -> str:
        if self.is_plain:
            return _render_plain(messages, options)
        render = self._templates[self._choose(options)]
        variables = self._special_tokens | options.variables
        return render(
            messages=messages,
            tools=options.tools,
            documents=options.documents,
            add_generation_prompt=options.add_generation_prompt,
            **{name: value for name, value in variables.items() if name not in RESERVED_VARIABLES},
        )

    def _render_unfinished(self, messages: Conversation, options: ChatOptions) -> str:
        """Render up to the end of the last message's text, as transformers does."""
        marked = copy.deepcopy(messages)
        final = marked[-1].get("content")
        if not isinstance(final, str):
            raise InputError("continue_final_message: the last message has no text to continue")
        marked[-1]["content"] = final + CONTINUATION_MARK
        rendered = self._render(marked, options)
        mark = CONTINUATION_MARK.strip()
        if final.strip() not in rendered or mark not in rendered:
            raise InputError("continue_final_message: the chat template drops or changes the last message")
        end = rendered.rindex(mark)
        if rendered[end:].startswith(CONTINUATION_MARK):
            return rendered[:end]
        # The template strips messages, so the text before the mark has to be stripped as well.
        return rendered[:end].rstrip()

    def _choose(self, options: ChatOptions) -> str:
        """Return the name of the template to use, by transformers' rule."""
        name = TOOL_TEMPLATE if options.tools is not None and TOOL_TEMPLATE in self._templates else DEFAULT_TEMPLATE
        if name not in self._templates:
            raise InputError(f"this model has no chat template {name!r}, only {', '.join(sorted(self._templates))}")
        return name


# Given by name to every template.
RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def load_chat_template(bundle: Path) -> ChatTemplate:
    """Load the chat template of the bundle in a directory, or the plain one.

    Raises:
        BundleError: there is no bundle, or its template does not parse.
    """
    return ChatTemplate(read_chat_format(read_bundle(bundle, verify=False)), bundle)


def _compile(source: str, name: str, bundle: Path) -> Callable[..., str]:
    """Return a function that renders `source`; it raises InputError."""
    from jinja2 import TemplateError

    from edge_runtime.service.jinja_environment import compile_template

    try:
        template = compile_template(source)
    except TemplateError as error:
        raise BundleCorrupt(
            f"the chat template {name!r} in {bundle / CHAT_FILE} does not parse: {error}; export the bundle again"
        ) from None

    def render(**variables: Any) -> str:
        try:
            return template.render(**variables)
        except Exception as error:  # evaluating a template can raise any exception
            raise InputError(f"the chat template rejects this conversation: {error}") from None

    return render


def _render_plain(messages: Conversation, options: ChatOptions) -> str:
    if options.tools or options.documents:
        raise InputError("this model has no chat template, so it takes neither tools nor documents")
    turns = []
    for message in messages:
        role = PLAIN_ROLES.get(message["role"])
        if role is None:
            raise InputError(f"this model has no chat template, so it takes no messages of role {message['role']!r}")
        turns.append(f"{role}: {message['content']}\n\n")
    return "".join(turns) + ("Assistant:" if options.add_generation_prompt else "")
