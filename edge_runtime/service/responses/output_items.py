"""Builds the items of a response from the changes of an answer, with the events of a stream."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from edge_runtime.service.answer import NO_CHANGE, TextChange
from edge_runtime.service.conversation import ChatMessage, FunctionCall, ToolCall
from edge_runtime.service.openai_schema import ChatTokenLogprob
from edge_runtime.service.response_formatter import describe_tokens
from edge_runtime.service.responses.schema import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputReasoning,
    OutputTextDelta,
    OutputTextDone,
    OutputTextPart,
    ReasoningTextDelta,
    ReasoningTextDone,
    ReasoningTextPart,
    StreamedEvent,
)
from edge_runtime.service.tool_calls.parser import CallDelta

B = TypeVar("B", bound="ItemBuilder")


class ItemBuilder(ABC):
    """Builds one item.

    Attributes:
        text: its text, or the arguments of a call.
    """

    id_prefix: str

    def __init__(self, index: int, sequence: Iterator[int]) -> None:
        """
        Args:
            index: of the item in the output.
            sequence: numbers of the next events of the response.
        """
        self.status: ItemStatus = "in_progress"
        self.text = ""
        self._id = self.id_prefix + secrets.token_hex(24)
        self._index = index
        self._sequence = sequence

    @abstractmethod
    def build(self, *, empty: bool = False) -> OutputItem:
        """Return the item, complete so far or as it begins."""

    def begin(self) -> list[StreamedEvent]:
        """Return the events at the start of the item."""
        return [
            OutputItemAdded(sequence_number=next(self._sequence), output_index=self._index, item=self.build(empty=True))
        ]

    def end(self, status: ItemStatus) -> list[StreamedEvent]:
        """Complete the item and return the events at its end."""
        self.status = status
        return [OutputItemDone(sequence_number=next(self._sequence), output_index=self._index, item=self.build())]

    @property
    def _place(self) -> dict[str, Any]:
        return {"sequence_number": next(self._sequence), "item_id": self._id, "output_index": self._index}


class MessageBuilder(ItemBuilder):
    """Builds the message."""

    id_prefix = "msg_"

    def __init__(self, index: int, sequence: Iterator[int]) -> None:
        super().__init__(index, sequence)
        self._logprobs: list[ChatTokenLogprob] = []

    def build(self, *, empty: bool = False) -> OutputMessage:
        return OutputMessage(self._id, self.status, [] if empty else [OutputTextPart(self.text, [], self._logprobs)])

    def begin(self) -> list[StreamedEvent]:
        return [*super().begin(), ContentPartAdded(**self._place, part=OutputTextPart(""))]

    def append(self, change: TextChange, logprobs: list[ChatTokenLogprob]) -> StreamedEvent:
        """Append content, and return the event."""
        self.text = self.text[: len(self.text) - change.withdrawn] + change.text
        self._logprobs += logprobs
        return OutputTextDelta(
            **self._place,
            delta=change.text,
            logprobs=logprobs,
            unverified=change.unverified or msgspec.UNSET,
            withdrawn=change.withdrawn or msgspec.UNSET,
        )

    def end(self, status: ItemStatus) -> list[StreamedEvent]:
        part = OutputTextPart(self.text, [], self._logprobs)
        return [
            OutputTextDone(**self._place, text=self.text, logprobs=self._logprobs),
            ContentPartDone(**self._place, part=part),
            *super().end(status),
        ]


class ReasoningBuilder(ItemBuilder):
    """Builds the reasoning."""

    id_prefix = "rs_"

    def build(self, *, empty: bool = False) -> OutputReasoning:
        return OutputReasoning(self._id, self.status, [] if empty else [ReasoningTextPart(self.text)])

    def begin(self) -> list[StreamedEvent]:
        return [*super().begin(), ContentPartAdded(**self._place, part=ReasoningTextPart(""))]

    def append(self, text: str) -> StreamedEvent:
        """Append reasoning, and return the event."""
        self.text += text
        return ReasoningTextDelta(**self._place, delta=text)

    def end(self, status: ItemStatus) -> list[StreamedEvent]:
        return [
            ReasoningTextDone(**self._place, text=self.text),
            ContentPartDone(**self._place, part=ReasoningTextPart(self.text)),
            *super().end(status),
        ]


class CallBuilder(ItemBuilder):
    """Builds a call."""

    id_prefix = "fc_"

    def __init__(self, index: int, sequence: Iterator[int], call: CallDelta) -> None:
        super().__init__(index, sequence)
        self._call = call

    def build(self, *, empty: bool = False) -> OutputCall:
        return OutputCall(self._id, self._call.id, self._call.name, "" if empty else self.text, self.status)

    def append(self, arguments: str) -> StreamedEvent:
        """Append a piece of the arguments, and return the event."""
        self.text += arguments
        return ArgumentsDelta(**self._place, delta=arguments)

    def end(self, status: ItemStatus) -> list[StreamedEvent]:
        return [ArgumentsDone(**self._place, arguments=self.text, name=self._call.name), *super().end(status)]


class OutputItems:
    """The items of one response.

    Reasoning and calls are complete when something else follows, the message only at the end of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, sequence: Iterator[int]) -> None:
        """
        Args:
            sequence: numbers of the next events of the response.
        """
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._builders: list[ItemBuilder] = []
        # The item that was appended to last.
        self._current: ItemBuilder | None = None
        # Log-probabilities that came before the message.
        self._early: list[ChatTokenLogprob] = []

    def build(self) -> list[OutputItem]:
        """Return the items."""
        return [builder.build() for builder in self._builders]

    def append(self, change: TextChange) -> list[StreamedEvent]:
        """Append a change of one kind, and return its events."""
        if change.reasoning:
            reasoning, events = self._continue(self._find(ReasoningBuilder), ReasoningBuilder)
            return [*events, reasoning.append(change.reasoning)]
        if change.calls:
            return [event for call in change.calls for event in self._append_call(call)]
        self._early += describe_tokens(self._tokenizer, change.tokens)
        message = self._find(MessageBuilder)
        if not (change.text or change.withdrawn) and (message is None or not self._early):
            return []
        return self._append_content(change)

    def finish(self, *, complete: bool) -> list[StreamedEvent]:
        """Complete all items, and return the events. An answer without any item gets an empty message."""
        events = [] if self._builders else self._append_content(NO_CHANGE)
        for builder in self._builders:
            if builder.status == "in_progress":
                events += builder.end("completed" if complete or builder is not self._current else "incomplete")
        return events

    def to_message(self) -> ChatMessage:
        """Return the items as a message of the conversation."""
        message, reasoning, calls = self._find(MessageBuilder), None, []
        for item in self.build():
            if isinstance(item, OutputReasoning):
                reasoning = item.content[0].text
            elif isinstance(item, OutputCall):
                calls.append(ToolCall(FunctionCall(item.name, item.arguments), item.call_id))
        content = message.text if message else None
        return ChatMessage("assistant", content, tool_calls=calls or None, reasoning_content=reasoning)

    def _append_content(self, change: TextChange) -> list[StreamedEvent]:
        message, events = self._continue(self._find(MessageBuilder), MessageBuilder)
        logprobs, self._early = self._early, []
        return [*events, message.append(change, logprobs)]

    def _append_call(self, call: CallDelta) -> list[StreamedEvent]:
        known = None if call.id else self._find(CallBuilder)
        builder, events = self._continue(known, lambda index, sequence: CallBuilder(index, sequence, call))
        return [*events, builder.append(call.arguments)] if call.arguments else events

    def _continue(self, known: B | None, create: Callable[[int, Iterator[int]], B]) -> tuple[B, list[StreamedEvent]]:
        """Return the item to append to, `known` or a new one, and the events of what ends and begins."""
        events: list[StreamedEvent] = []
        last, builder = self._current, known or create(len(self._builders), self._sequence)
        if last and last is not builder and not isinstance(last, MessageBuilder):
            events += last.end("completed")
        if known is None:
            self._builders.append(builder)
            events += builder.begin()
        self._current = builder
        return builder, events

    def _find(self, kind: type[B]) -> B | None:
        """Return the last item of a kind."""
        return next((builder for builder in reversed(self._builders) if isinstance(builder, kind)), None)
