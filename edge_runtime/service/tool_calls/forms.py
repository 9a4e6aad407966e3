"""The forms in which models write tool calls and reasoning, and how a chat template shows which one its model uses.

Every family of models is trained on a form of its own:

    hermes        <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>         Hermes, Qwen 2.5 and 3, SmolLM3
    qwen3-coder   <tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>...</function>\\n</tool_call>
    glm           <tool_call>NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>...</tool_call>      GLM 4.5
    llama3        {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>            Llama 3.1 to 3.3
    mistral       [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}, ...]            Mistral before that
    mistral-args  [TOOL_CALLS]NAME[ARGS]{...}                                              Mistral Small 3.2, Magistral
    granite       <|tool_call|>[{"name": ..., "arguments": {...}}, ...]                       Granite 3, Phi-4-mini
    deepseek      <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{...}\\n```<｜tool▁call▁end｜>    V3, R1
    deepseek-v3.1 <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
    command-r     Action:\\n```json\\n[{"tool_name": ..., "parameters": {...}}]\\n```            Command R

A form is recognized by the markers in the source of the chat template. Where that shows none, `hermes` is used, and
`tool_calls.prompt` describes it to the model.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args

import msgspec

from edge_runtime.settings import ReasoningFormName, ToolCallFormName

# Keys of name and arguments in the JSON of calls; models confuse them.
NAME_KEYS = ("name", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters")


class ParameterMarkers(msgspec.Struct, frozen=True, kw_only=True):
    """The markers of calls that write each argument on its own: name, then for each argument key and value.

    Attributes:
        name, name_end: around the function's name.
        key, key_end: around the name of an argument.
        value, value_end: around its value; white space may precede `value`.
        end: after the last argument.
    """

    name: str
    name_end: str
    key: str
    key_end: str
    value: str
    value_end: str
    end: str


class ToolCallForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a family of models writes tool calls.

    Attributes:
        name: its name in the settings.
        signs: sets of texts, all of one of which the chat template contains if its model uses this form.
        begin: starts a call; empty for a form whose text begins with the call's JSON.
        optional_begin: may precede such a JSON.
        separator: what a model writes between two calls.
        end: what it writes after one.
        section, section_end: what it writes before the first call and after the last one.
        body: what is between `begin` and `end`: a JSON `object`; a JSON `array` of all calls, so that `begin` occurs
            once; a `named` call: header and JSON of the arguments; or single `parameters`.
        keys: keys of name and arguments in the JSON of a call.
        header: of a named call: a pattern of what precedes the JSON of the arguments; group `name` is the function's.
        header_format: the header that the model was trained on, with `{name}`.
        parameters: the markers of a body of parameters.
        id_length: length of the alphanumeric ids of calls that the chat template demands; 0 for any id.
    """

    name: ToolCallFormName
    signs: tuple[tuple[str, ...], ...]
    begin: str
    body: Literal["object", "array", "named", "parameters"]
    optional_begin: str = ""
    separator: str = "\n"
    end: str = ""
    section: str = ""
    section_end: str = ""
    keys: tuple[str, str] = ("name", "arguments")
    header: str = ""
    header_format: str = ""
    parameters: ParameterMarkers | None = None
    id_length: int = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that start a call, none of which is empty."""
        return tuple(marker for marker in (self.begin, self.optional_begin) if marker)

    @property
    def structure(self) -> str:
        """All text of the form that is the same in every call."""
        parts = [self.section, self.begin, self.optional_begin, self.header_format, self.separator, self.end]
        return "".join(
            [*parts, self.section_end, *(msgspec.structs.astuple(self.parameters) if self.parameters else ())]
        )

    @property
    def hidden(self) -> tuple[str, ...]:
        """Texts that surround all calls and mean nothing by themselves."""
        return tuple(marker for marker in (self.section, self.section_end) if marker)


class ReasoningForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a model that thinks marks its reasoning: between `begin` and `end`. `signs`: see `ToolCallForm`."""

    name: ReasoningFormName
    signs: tuple[tuple[str, ...], ...]
    begin: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether the rendered prompt ends within the reasoning: its generation prompt has opened the block."""
        return prompt.rstrip().endswith(self.begin)

    def is_closed(self, prompt: str) -> bool:
        """Whether the generation prompt already contains the whole (empty) reasoning."""
        return prompt.rstrip().endswith(self.end)


# The first form whose signs the template has is used: the more specific ones come first.
TOOL_CALL_FORMS: tuple[ToolCallForm, ...] = (
    ToolCallForm(
        name="qwen3-coder",
        signs=(("<tool_call>", "<function=", "<parameter="),),
        begin="<tool_call>",
        end="\n</tool_call>",
        body="parameters",
        parameters=ParameterMarkers(
            name="\n<function=",
            name_end=">\n",
            key="<parameter=",
            key_end=">",
            value="\n",
            value_end="\n</parameter>\n",
            end="</function>",
        ),
    ),
    ToolCallForm(
        name="glm",
        signs=(("<tool_call>", "<arg_key>"),),
        begin="<tool_call>",
        end="",
        body="parameters",
        parameters=ParameterMarkers(
            name="",
            name_end="\n",
            key="<arg_key>",
            key_end="</arg_key>\n",
            value="<arg_value>",
            value_end="</arg_value>\n",
            end="</tool_call>",
        ),
    ),
    ToolCallForm(name="hermes", signs=(("<tool_call>",),), begin="<tool_call>", end="\n</tool_call>", body="object"),
    ToolCallForm(
        name="mistral-args",
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        begin="[TOOL_CALLS]",
        separator="",
        body="named",
        header=r"\s*(?P<name>[^\s\[\]{}]+)(\[CALL_ID\][^\[\]{}]*)?(\[ARGS\])?\s*",
        header_format="{name}[ARGS]",
        id_length=9,
    ),
    ToolCallForm(name="mistral", signs=(("[TOOL_CALLS]",),), begin="[TOOL_CALLS]", body="array", id_length=9),
    ToolCallForm(
        name="deepseek",
        signs=(("<｜tool▁call▁begin｜>", "```json"),),
        begin="<｜tool▁call▁begin｜>",
        end="\n```<｜tool▁call▁end｜>",
        section="<｜tool▁calls▁begin｜>",
        section_end="<｜tool▁calls▁end｜>",
        body="named",
        header=r"(function)?<｜tool▁sep｜>(?P<name>[^\s<{]+)\s*(```(json)?\s*)?",
        header_format="function<｜tool▁sep｜>{name}\n```json\n",
    ),
    ToolCallForm(
        name="deepseek-v3.1",
        signs=(("<｜tool▁call▁begin｜>",),),
        begin="<｜tool▁call▁begin｜>",
        end="<｜tool▁call▁end｜>",
        section="<｜tool▁calls▁begin｜>",
        section_end="<｜tool▁calls▁end｜>",
        separator="",
        body="named",
        header=r"\s*(?P<name>[^\s<{]+)<｜tool▁sep｜>\s*",
        header_format="{name}<｜tool▁sep｜>",
    ),
    ToolCallForm(name="granite", signs=(("<|tool_call|>",),), begin="<|tool_call|>", body="array"),
    ToolCallForm(
        name="command-r",
        signs=(("Action:", "```json", "tool_name"),),
        begin="Action:",
        end="\n```",
        body="array",
        keys=("tool_name", "parameters"),
    ),
    ToolCallForm(
        name="llama3",
        signs=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
        begin="",
        optional_begin="<|python_tag|>",
        separator="; ",
        body="object",
        keys=("name", "parameters"),
    ),
)
REASONING_FORMS: tuple[ReasoningForm, ...] = (
    ReasoningForm(name="mistral", signs=(("[THINK]",),), begin="[THINK]", end="[/THINK]"),
    ReasoningForm(name="think", signs=(("<think>",), ("</think>",)), begin="<think>", end="</think>"),
)
FALLBACK_FORM: ToolCallFormName = "hermes"


def tool_call_form(name: str) -> ToolCallForm:
    """Return the form of this name. Raises KeyError."""
    forms: dict[str, ToolCallForm] = {form.name: form for form in TOOL_CALL_FORMS}
    return forms[name]


def detect_tool_call_form(template: str) -> ToolCallForm | None:
    """Return the form that the source of a chat template shows; None if it shows none."""
    return next((form for form in TOOL_CALL_FORMS if _has_signs(template, form.signs)), None)


def reasoning_form(name: str) -> ReasoningForm | None:
    """Return the form of this name, None for `none`. Raises KeyError."""
    forms: dict[str, ReasoningForm | None] = {form.name: form for form in REASONING_FORMS}
    return (forms | {"none": None})[name]


def detect_reasoning_form(template: str) -> ReasoningForm | None:
    """Return the form of reasoning that the source of a chat template shows; None if its model does not think."""
    return next((form for form in REASONING_FORMS if _has_signs(template, form.signs)), None)


def takes_tools(template: str) -> bool:
    """Whether the source of a chat template uses the tools that it is given."""
    return re.search(r"\btools\b", template) is not None


def takes_calls(template: str) -> bool:
    """Whether the source of a chat template renders earlier calls and their results."""
    return "tool_calls" in template


def format_calls(form: ToolCallForm, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Write calls, each a name and its arguments, as the model would."""
    if form.body == "array":
        items = [json.dumps(dict(zip(form.keys, call, strict=True)), ensure_ascii=False) for call in calls]
        prefix, suffix = array_brackets(form)
        return form.begin + prefix + ", ".join(items) + suffix + form.end
    written = [form.begin + _format_body(form, name, arguments) + form.end for name, arguments in calls]
    return form.section + form.separator.join(written) + form.section_end


def array_brackets(form: ToolCallForm) -> tuple[str, str]:
    """Return what precedes and follows the items of an array of calls."""
    return {"mistral": (" [", "]"), "command-r": ("\n```json\n[\n", "\n]")}.get(form.name, ("[", "]"))


def object_brackets(form: ToolCallForm, name: str) -> tuple[str, str]:
    """Return what precedes and follows the JSON of the arguments of a call, without `begin` and `end`."""
    if form.body == "named":
        return form.header_format.format(name=name), ""
    line = "\n" if form.begin and form.body == "object" else ""
    name_key, arguments_key = form.keys
    return f'{line}{{"{name_key}": {json.dumps(name, ensure_ascii=False)}, "{arguments_key}": ', "}"


def _format_body(form: ToolCallForm, name: str, arguments: dict[str, Any]) -> str:
    if form.parameters:
        marks = form.parameters
        text = marks.name + name + marks.name_end
        for key, value in arguments.items():
            written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text += marks.key + key + marks.key_end + marks.value + written + marks.value_end
        return text + marks.end
    before, after = object_brackets(form, name)
    return before + json.dumps(arguments, ensure_ascii=False) + after


def _has_signs(template: str, signs: tuple[tuple[str, ...], ...]) -> bool:
    return any(all(sign in template for sign in group) for group in signs)


assert {form.name for form in TOOL_CALL_FORMS} == set(get_args(ToolCallFormName))
