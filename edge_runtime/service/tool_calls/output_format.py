"""The form of an answer's text: the tools that it may call, the grammar that it must match, and its parser."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.sampling import MAX_GRAMMAR_CHARACTERS
from edge_runtime.service.chat_template import ChatOptions, ChatTemplate, Conversation
from edge_runtime.service.errors import ApiError
from edge_runtime.service.tool_calls.forms import (
    FALLBACK_FORM,
    ReasoningForm,
    ToolCallForm,
    detect_reasoning_form,
    detect_tool_call_form,
    reasoning_form,
    tool_call_form,
)
from edge_runtime.service.tool_calls.grammar import AddedTokens, AnswerShape, Tool, build_grammar
from edge_runtime.service.tool_calls.parser import OutputParser

# OpenAI's rule for names, and the dots of some servers of the model context protocol.
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# Levels of lists and objects in a schema of parameters. llguidance takes somewhat more.
MAX_SCHEMA_DEPTH = 64
# The error of templates, such as Llama 3.1's, that render one call per message.
SINGLE_CALL_SIGN = "only supports single tool-calls"


class FunctionName(msgspec.Struct, frozen=True):
    """The name of a function."""

    name: str


class NamedToolChoice(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """The model must call this function."""

    function: FunctionName


class AllowedFunction(msgspec.Struct, frozen=True):
    """A function that may be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class AllowedTools(msgspec.Struct, frozen=True):
    """The functions that may be called, and whether one must be."""

    tools: list[AllowedFunction]
    mode: Literal["auto", "required"] = "auto"


class AllowedToolsChoice(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    """The model may, or must, call some of the tools."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice


class OutputForms(msgspec.Struct, frozen=True):
    """How a model writes calls and reasoning.

    Attributes:
        reasoning: its form of reasoning; None if it does not think.
        single_call: its chat template renders one call per message.
    """

    tool_calls: ToolCallForm
    reasoning: ReasoningForm | None = None
    single_call: bool = False


class AllowedCalls(msgspec.Struct, frozen=True):
    """Which calls an answer may contain: none without tools.

    Attributes:
        tools: those that may be called.
        required: the answer consists of calls.
        single: at most one call.
    """

    tools: list[Tool] = []
    required: bool = False
    single: bool = False


class OutputFormat(msgspec.Struct, frozen=True):
    """How the text of one answer is read.

    Attributes:
        form: how calls are written; None if there are no tools.
        reasoning: how reasoning is marked; None if there is none.
        in_reasoning: the prompt ends within the reasoning.
        single_call: the answer ends after the first call.
        parameters: JSON schemas of the parameters of each tool.
        visible: ids of special tokens that are part of a form.
    """

    form: ToolCallForm | None = None
    reasoning: ReasoningForm | None = None
    in_reasoning: bool = False
    single_call: bool = False
    parameters: dict[str, dict[str, Any]] = {}
    visible: frozenset[int] = frozenset()

    def new_parser(self) -> OutputParser | None:
        """Return a parser of the text; None for text that is content as it is."""
        if self.form is None and self.reasoning is None:
            return None
        return OutputParser(
            self.form,
            self.reasoning,
            parameters=self.parameters,
            in_reasoning=self.in_reasoning,
            single_call=self.single_call,
        )


PLAIN_TEXT = OutputFormat()


def find_forms(template: ChatTemplate, calls: str = "auto", reasoning: str = "auto") -> OutputForms:
    """Return the forms of a model.

    Args:
        calls, reasoning: names of forms; `auto` recognizes them by the chat template.
    """
    source = template.source(ChatOptions(tools=[]))
    form = detect_tool_call_form(source) if calls == "auto" else tool_call_form(calls)
    thinks = detect_reasoning_form(source) if reasoning == "auto" else reasoning_form(reasoning)
    return OutputForms(form or tool_call_form(FALLBACK_FORM), thinks, SINGLE_CALL_SIGN in source)


def get_allowed_calls(
    tools: list[dict[str, Any]] | None, choice: ToolChoice | None, parallel: bool | None
) -> AllowedCalls:
    """Return which calls a request allows.

    Raises:
        ApiError: (400) a tool is not a function with a name, or the choice names another function.
    """
    known: dict[str, Tool] = {}
    for index, description in enumerate(tools or []):
        try:
            tool = _read_tool(description)
            if tool.name in known:
                raise ValueError(f"another tool is called {tool.name}, too")
        except ValueError as error:
            raise ApiError(400, f"tools[{index}]: {error}", param=f"tools[{index}]") from None
        known[tool.name] = tool
    if choice == "none":
        return AllowedCalls()
    names, required, single = list(known), choice == "required", parallel is False
    if isinstance(choice, NamedToolChoice):
        names, required, single = [choice.function.name], True, True
    elif isinstance(choice, AllowedToolsChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        required = choice.allowed_tools.mode == "required"
    if unknown := [name for name in names if name not in known]:
        raise ApiError(400, f"tool_choice: there is no tool {unknown[0]!r}", param="tool_choice")
    if required and not names:
        raise ApiError(400, "tool_choice: a call is required, and there are no tools", param="tool_choice")
    return AllowedCalls([known[name] for name in names], required, single)


def make_output_format(
    forms: OutputForms,
    calls: AllowedCalls,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    conversation: Conversation,
    options: ChatOptions,
) -> OutputFormat:
    """Return how the answer to a conversation is read, which was rendered as `prompt`."""
    reasoning, in_reasoning = forms.reasoning, False
    if reasoning and options.continue_final_message:
        content = conversation[-1]["content"]
        in_reasoning = content.rfind(reasoning.begin) > content.rfind(reasoning.end)
        reasoning = reasoning if in_reasoning or not content.strip() else None
    elif reasoning:
        in_reasoning = reasoning.is_open(prompt)
        reasoning = None if reasoning.is_closed(prompt) else reasoning
    form = forms.tool_calls if calls.tools else None
    structure = (form.structure if form else "") + (reasoning.begin + reasoning.end if reasoning else "")
    return OutputFormat(
        form=form,
        reasoning=reasoning,
        in_reasoning=in_reasoning,
        single_call=bool(calls.tools) and (calls.single or forms.single_call),
        parameters={tool.name: tool.parameters for tool in calls.tools},
        visible=frozenset(
            index
            for index, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content in structure
        ),
    )


def make_grammar(output: OutputFormat, calls: AllowedCalls, tokenizer: Tokenizer, text_grammar: str = "") -> str:
    """Return the grammar of the answer (`Sampling.grammar`); empty if any text is allowed.

    Args:
        text_grammar: what text without calls must match; empty for any text.

    Raises:
        GrammarError: a schema cannot be enforced, or the grammar is too long. Calls that are neither required nor of
            strict tools are not constrained then.
    """
    if output.form is None and (output.reasoning is None or not text_grammar):
        return text_grammar
    shape = AnswerShape(
        form=output.form or tool_call_form(FALLBACK_FORM),
        tools=calls.tools,
        required=calls.required,
        parallel=not output.single_call,
        reasoning=output.reasoning,
        in_reasoning=output.in_reasoning,
        text_grammar="" if calls.required else text_grammar,
    )
    grammar = build_grammar(shape, AddedTokens.of(tokenizer))
    if len(grammar) <= MAX_GRAMMAR_CHARACTERS:
        return grammar
    if calls.required or text_grammar or any(tool.strict for tool in calls.tools):
        raise GrammarError(f"tools: their grammar has more than {MAX_GRAMMAR_CHARACTERS} characters: send fewer tools")
    return ""


def _read_tool(description: dict[str, Any]) -> Tool:
    """Raises ValueError if this is not a function with a name."""
    function = description.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if description.get("type") != "function" or not isinstance(function, dict) or not isinstance(name, str):
        raise ValueError('not {"type": "function", "function": {"name": ..., ...}}')
    if not TOOL_NAME.fullmatch(name):
        raise ValueError("a name has 1 to 128 letters, digits, dots, dashes or underscores")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError("parameters must be a JSON schema of an object")
    if _is_deeper(parameters, MAX_SCHEMA_DEPTH):
        raise ValueError(f"parameters are nested more than {MAX_SCHEMA_DEPTH} levels deep")
    return Tool(name, parameters, bool(function.get("strict")))


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects in a JSON value are nested more than `depth` levels deep."""
    level = [value]
    for _ in range(depth + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
        if not containers:
            return False
    return True
