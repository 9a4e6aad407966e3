"""Parses the text that a model writes, while it streams, into content, reasoning and tool calls.

The parser reads one character at a time, so the result does not depend on how the text is split into pieces. It is a
coroutine: `_run` and what it delegates to read like an ordinary recursive-descent parser, and wait where the text ends
so far. A call is reported as soon as its name is known, and its arguments as they are written. Text that begins like a
call and turns out to be none is content.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import msgspec

from edge_runtime.service.stop_strings import overlap
from edge_runtime.service.tool_calls.forms import ARGUMENT_KEYS, NAME_KEYS, ReasoningForm, ToolCallForm

T = TypeVar("T")
# A coroutine that is sent one character at a time.
Reading = Generator[None, str, T]

SPACES = " \t\r\n"
# Longest name of a function or argument, with what surrounds it: longer ones are no names. Chosen; OpenAI's limit of a
# name is 64 characters.
MAX_HEADER_CHARACTERS = 256
ID_CHARACTERS = string.ascii_letters + string.digits
# How templates that use Python's `str` write these values.
PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}


class CallDelta(msgspec.Struct, frozen=True):
    """What is new of one call: `id` and `name` when it starts, then pieces of the JSON of its arguments."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class MessageDelta(msgspec.Struct, frozen=True):
    """What is new of a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = []


class MalformedCall(Exception):
    """The text after a marker is no call."""


def merge_calls(calls: list[CallDelta], later: list[CallDelta]) -> list[CallDelta]:
    """Append `later` to `calls`; consecutive pieces of one call become one."""
    merged = list(calls)
    for call in later:
        if merged and merged[-1].index == call.index:
            last = merged[-1]
            merged[-1] = msgspec.structs.replace(last, arguments=last.arguments + call.arguments)
        else:
            merged.append(call)
    return merged


class OutputParser:
    """Parses the text of one answer.

    Attributes:
        complete: no more text is wanted: the only call that is allowed is complete.
        in_reasoning: the text so far ends within the reasoning.
    """

    def __init__(
        self,
        form: ToolCallForm | None,
        reasoning: ReasoningForm | None = None,
        *,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        in_reasoning: bool = False,
        single_call: bool = False,
    ) -> None:
        """
        Args:
            form: None if the text cannot contain calls.
            reasoning: None if the model does not think.
            parameters: JSON schemas of the parameters of each tool.
            in_reasoning: the prompt ends within the reasoning.
            single_call: the text ends after the first call.
        """
        self.calls = 0
        self.complete = False
        self.in_reasoning = in_reasoning
        self._form, self._reasoning, self._single_call = form, reasoning, single_call
        self._parameters = parameters or {}
        # Text that starts something other than content, and text that is dropped.
        self._call_markers = form.markers if form else ()
        self._hidden = form.hidden if form else ()
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._deltas: list[CallDelta] = []
        # Characters to be read again before those that arrive.
        self._ahead: list[str] = []
        # Text that may still become a marker, and white space before it.
        self._held, self._spaces = "", list[str]()
        # What has been read since a marker, until the first call's name is known.
        self._raw = ""
        self._records_raw = False
        self._in_content = self._in_call = False
        # Nothing but white space has been written since the start, the reasoning, or a call.
        self._at_start = True
        self._after_call = self._after_reasoning = False
        self._reader = self._run()
        next(self._reader)

    def feed(self, text: str) -> MessageDelta:
        """Append `text` and return what is new of the message."""
        for character in text:
            if self.complete:
                break
            self._reader.send(character)
        return self._take()

    def flush(self) -> MessageDelta:
        """Return what was held back; to be called at the end of the text."""
        if not self.complete:
            if self.in_reasoning:
                if self._held:
                    self._thoughts += [*self._spaces, self._held]
            elif self._in_content and self._after_call:
                # The start of a marker between calls or after them may be cut off by the limit of the length.
                partial = max(overlap(self._held, marker) for marker in ("", *self._markers))
                self._content.append(self._held[: len(self._held) - partial])
            elif self._in_content:
                self._content += [*([] if self._after_reasoning else self._spaces), self._held]
            else:
                self._content.append(self._raw)
        self._held, self._spaces, self._raw = "", [], ""
        return self._take()

    def preview(self, tail: str) -> str:
        """Return the content that `tail` would surely add; text that may be a call or reasoning is left out."""
        if self.complete or not self._in_content:
            return ""
        text = self._held + tail
        shown, _ = self._split(text)
        content = text[:shown]
        if self._after_reasoning or self._after_call:
            return content.lstrip(SPACES)
        return "".join(self._spaces) + content if content else ""

    def _take(self) -> MessageDelta:
        delta = MessageDelta("".join(self._content), "".join(self._thoughts), merge_calls([], self._deltas))
        self._content, self._thoughts, self._deltas = [], [], []
        return delta

    # Content and reasoning.

    def _run(self) -> Reading[None]:
        if self.in_reasoning:
            yield from self._read_reasoning()
        while True:
            marker = yield from self._read_content()
            if self._reasoning and marker == self._reasoning.begin:
                yield from self._read_reasoning()
            elif marker not in self._hidden:
                yield from self._read_calls(marker)

    def _read_content(self) -> Reading[str]:
        """Emit content up to a marker, and return the marker."""
        self._in_content, self._held, self._spaces = True, "", []
        while True:
            character = yield from self._next()
            if not self._held and character in self._separators and self._may_have_markers:
                self._spaces.append(character)
                continue
            self._held += character
            shown, marker = self._split(self._held)
            if shown:
                if not self._after_reasoning and not self._after_call:
                    self._content += self._spaces
                self._content.append(self._held[:shown])
                self._held, self._spaces = self._held[shown:], []
                self._at_start = self._after_reasoning = self._after_call = False
            if marker:
                # White space before what turns out to be no call is content.
                self._raw = "".join(self._spaces) + self._held
                self._in_content, self._held, self._spaces = False, "", []
                return marker
            if self._held.isspace():
                self._spaces.append(self._held)
                self._held = ""

    def _split(self, text: str) -> tuple[int, str]:
        """Return how many characters of `text` are surely content, and the marker that follows them, if any.

        White space before a marker belongs to neither.
        """
        if self._is_bare and text.lstrip(self._separators).startswith("{"):
            return 0, "{"
        if not self._may_have_markers:
            return len(text), ""
        found = [(at, marker) for marker in self._markers if (at := text.find(marker)) >= 0]
        if found:
            at, marker = min(found, key=lambda pair: (pair[0], -len(pair[1])))
        else:
            at, marker = len(text) - max((overlap(text, marker) for marker in self._markers), default=0), ""
        shown = len(text[:at].rstrip(SPACES))
        return (shown if text[:shown].strip(self._separators) else 0), marker

    @property
    def _separators(self) -> str:
        """Characters that may precede a marker without being content."""
        return SPACES + self._form.separator if self._after_call and self._form else SPACES

    @property
    def _may_have_markers(self) -> bool:
        return self._form is not None or bool(self._markers)

    @property
    def _is_bare(self) -> bool:
        """Whether a `{` starts a call here without a marker."""
        return self._form is not None and not self._form.begin and self._at_start

    @property
    def _markers(self) -> tuple[str, ...]:
        begin = (self._reasoning.begin,) if self._reasoning and self._at_start and not self.calls else ()
        return self._call_markers + self._hidden + begin

    def _read_reasoning(self) -> Reading[None]:
        assert self._reasoning is not None
        end, self.in_reasoning = self._reasoning.end, True
        self._held, self._spaces = "", []
        started = False
        while not self._held.endswith(end):
            character = yield from self._next()
            if not self._held and character in SPACES:
                # White space around the reasoning is dropped.
                if started:
                    self._spaces.append(character)
                continue
            self._held += character
            at = len(self._held) - len(end) if self._held.endswith(end) else len(self._held) - overlap(self._held, end)
            shown = len(self._held[:at].rstrip(SPACES))
            if shown:
                self._thoughts += [*self._spaces, self._held[:shown]]
                self._held, self._spaces, started = self._held[shown:], [], True
            if self._held.isspace():
                self._spaces.append(self._held)
                self._held = ""
        self.in_reasoning, self._held, self._spaces = False, "", []
        self._after_reasoning = self._at_start = True

    # Calls.

    def _read_calls(self, marker: str) -> Reading[None]:
        assert self._form is not None
        self._records_raw = True
        try:
            if self._form.body == "parameters":
                yield from self._read_parameters()
            elif self._form.body == "named":
                yield from self._read_named()
            else:
                yield from self._read_json(marker)
        except MalformedCall:
            self._end_call()
            # The text before the name; what follows the name has been reported as arguments.
            self._content.append(self._raw)
            self._at_start = self._after_call = False
        else:
            yield from self._skip(self._form.end.strip(SPACES))
            self._at_start = self._after_call = True
        self._raw, self._records_raw = "", False

    def _read_json(self, marker: str) -> Reading[None]:
        """Read a call, or an array of calls."""
        start = marker
        if marker != "{":
            start = yield from self._next_visible()
            if start == "`":
                # Command R writes the array into a block of Markdown.
                self._unread(start)
                yield from self._read_mark("```json")
                start = yield from self._next_visible()
        if start == "{":
            yield from self._read_object()
            return
        if start != "[":
            raise MalformedCall
        while (start := (yield from self._next_visible())) != "]":
            if start == "{":
                yield from self._read_object()
            elif start != ",":
                raise MalformedCall

    def _read_object(self) -> Reading[None]:
        """Read the JSON of one call after its `{`."""
        assert self._form is not None
        name, arguments, written = "", "{}", False
        while (start := (yield from self._next_visible())) != "}":
            if start == ",":
                continue
            if start != '"':
                raise MalformedCall
            key = yield from self._read_string()
            if (yield from self._next_visible()) != ":":
                raise MalformedCall
            start = yield from self._next_visible()
            if key in NAME_KEYS and start == '"' and not name:
                name = yield from self._read_string()
                if not name or (not self._form.begin and name not in self._parameters):
                    raise MalformedCall
                # A JSON object that only has the name of a tool need not be a call.
                if self._form.begin:
                    self._start_call(name)
            elif key in ARGUMENT_KEYS and name:
                self._start_call(name)
                yield from self._read_value(start)
                written = True
            elif key in ARGUMENT_KEYS:
                arguments = yield from self._read_value(start)
            else:
                yield from self._read_value(start, ignored=True)
        if not name:
            raise MalformedCall
        self._start_call(name)
        if not written:
            self._report(arguments)
        self._end_call()

    def _read_named(self) -> Reading[None]:
        """Read a header with the name, and the JSON of the arguments."""
        assert self._form is not None
        header = ""
        while (character := (yield from self._next())) != "{":
            header += character
            if len(header) > MAX_HEADER_CHARACTERS:
                raise MalformedCall
        match = re.fullmatch(self._form.header, header)
        if not match:
            raise MalformedCall
        self._start_call(match["name"])
        yield from self._read_value(character)
        self._end_call()

    def _read_parameters(self) -> Reading[None]:
        """Read arguments that are written one by one, and report them as JSON."""
        assert self._form is not None
        assert self._form.parameters is not None
        marks = self._form.parameters
        end, key_mark, value_mark = marks.end.strip(), marks.key, marks.value.strip()
        name_mark = marks.name.strip()
        if name_mark and (yield from self._read_mark(name_mark)) != name_mark:
            raise MalformedCall
        name = (yield from self._read_until(marks.name_end.strip() or "\n", end, key_mark)).strip()
        if not name or any(character in SPACES + "{}<>" for character in name):
            raise MalformedCall
        self._start_call(name)
        self._report("{")
        separator = ""
        while (mark := (yield from self._read_mark(key_mark, end))) == key_mark:
            key = (yield from self._read_until(marks.key_end.strip())).strip()
            self._report(f"{separator}{_to_json(key)}: ")
            separator = ", "
            if value_mark:
                yield from self._read_mark(value_mark)
            yield from self._read_argument(name, key, marks.value, marks.value_end.strip())
        if mark != end:
            raise MalformedCall
        self._report("}")
        self._end_call()

    def _read_argument(self, name: str, key: str, start: str, end: str) -> Reading[None]:
        """Read the value of one argument: text where the schema says so, else JSON."""
        schema = (self._parameters.get(name, {}).get("properties") or {}).get(key)
        is_text = _is_text(schema)
        lines = start.endswith("\n")
        if is_text:
            self._report('"')
        held, written, first = "", "", True
        while True:
            held += yield from self._next()
            if first and lines and held == "\n":
                held, first = "", False
                continue
            first = False
            if held.endswith(end):
                held = held[: -len(end)]
                written += held.removesuffix("\n") if lines else held
                break
            keep = overlap(held, end)
            if lines:
                keep = max(keep, overlap(held, "\n" + end))
            shown, held = held[: len(held) - keep], held[len(held) - keep :]
            if is_text:
                self._report(_to_json(shown)[1:-1])
            else:
                written += shown
        self._report(_to_json(written)[1:-1] + '"' if is_text else _normalize(written))

    # Pieces of calls.

    def _read_value(self, start: str, ignored: bool = False) -> Reading[str]:
        """Read a JSON value that begins with `start`.

        The value of the arguments is reported as it is written, if the call has started, or else returned.
        """
        streams = self._in_call and not ignored
        if start == '"':
            # Some models write the JSON of the arguments as a string.
            decoded = yield from self._read_string()
            if streams:
                self._report(decoded)
            return decoded
        text, depth, in_string, escaped = "", 0, False, False
        character = start
        while True:
            if in_string:
                in_string = escaped or character != '"'
                escaped = character == "\\" and not escaped
            elif character == '"':
                in_string = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
            if depth < 0 or (depth == 0 and character in "," + SPACES):
                # A number or literal ends before this character.
                self._unread(character)
                break
            text += character
            if streams and text[0] in "{[":
                self._report(character)
            if depth == 0 and character in "}]":
                return text
            character = yield from self._next()
        value = "{}" if text == "null" else text
        if streams:
            self._report(value)
        return value

    def _read_string(self) -> Reading[str]:
        """Read a JSON string after its opening quotation mark, and decode it."""
        text, escaped = "", False
        while True:
            character = yield from self._next()
            if character == '"' and not escaped:
                break
            escaped = character == "\\" and not escaped
            text += character
        try:
            decoded = json.loads(f'"{text}"', strict=False)
        except ValueError:
            raise MalformedCall from None
        assert isinstance(decoded, str)
        return decoded

    def _read_until(self, end: str, *others: str) -> Reading[str]:
        """Read a name up to `end`, which is dropped, or to one of `others`, which are read again."""
        text = ""
        while not text.endswith(end):
            text += yield from self._next()
            if len(text) > MAX_HEADER_CHARACTERS:
                raise MalformedCall
            for other in others:
                if text.endswith(other):
                    self._unread(other)
                    return text[: -len(other)]
        return text[: -len(end)]

    def _read_mark(self, *marks: str) -> Reading[str]:
        """Skip white space and read one of `marks`. Raises MalformedCall if another text follows."""
        text = yield from self._next_visible()
        while text not in marks:
            if not any(mark.startswith(text) for mark in marks):
                raise MalformedCall
            text += yield from self._next()
        return text

    def _skip(self, mark: str) -> Reading[None]:
        """Skip white space and `mark`, if they follow."""
        spaces: list[str] = []
        while mark and (character := (yield from self._next())) in SPACES:
            spaces.append(character)
        text = character if mark else ""
        while text != mark:
            if not mark.startswith(text):
                self._unread("".join(spaces) + text)
                return
            text += yield from self._next()

    def _next_visible(self) -> Reading[str]:
        """Read the next character that is not white space."""
        while (character := (yield from self._next())) in SPACES:
            pass
        return character

    def _next(self) -> Reading[str]:
        if self._ahead:
            character = self._ahead.pop()
        else:
            character = yield
        if self._records_raw:
            self._raw += character
        return character

    def _unread(self, text: str) -> None:
        """Let `text`, which was read last, be read again."""
        self._ahead.extend(reversed(text))
        if self._records_raw:
            self._raw = self._raw[: len(self._raw) - len(text)]

    def _start_call(self, name: str) -> None:
        """Report the call of this name, unless it has been."""
        if self._in_call:
            return
        assert self._form is not None
        self._in_call = True
        self._raw, self._records_raw = "", False
        self._deltas.append(CallDelta(self.calls, make_call_id(self._form.id_length), name))
        self.calls += 1

    def _report(self, arguments: str) -> None:
        if arguments:
            self._deltas.append(CallDelta(self.calls - 1, arguments=arguments))

    def _end_call(self) -> None:
        self.complete = self._in_call and self._single_call
        self._in_call = False


def make_call_id(length: int = 0) -> str:
    """Return a random id of a call: alphanumeric and of this length, or in OpenAI's form."""
    if length:
        return "".join(secrets.choice(ID_CHARACTERS) for _ in range(length))
    return "call_" + secrets.token_hex(12)


def _is_text(schema: Any) -> bool:
    """Whether a schema admits strings only."""
    if not isinstance(schema, Mapping):
        return False
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values:
        return all(isinstance(value, str) for value in values)
    return bool(schema.get("type") == "string")


def _normalize(written: str) -> str:
    """Return a value as JSON: as it is written if it is JSON, else as a string."""
    text = PYTHON_LITERALS.get(written.strip(), written)
    try:
        json.loads(text)
    except ValueError:
        return _to_json(written)
    return text


def _to_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
