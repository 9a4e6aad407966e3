"""The parts of an answer's text, and where stop strings end it."""

from __future__ import annotations

import pytest

from edge_runtime.service.answer_text import AnswerText
from edge_runtime.service.tool_calls.forms import REASONING_FORMS, tool_call_form
from edge_runtime.service.tool_calls.output_format import PLAIN_TEXT, OutputFormat
from edge_runtime.service.tool_calls.parser import CallDelta

THINK = REASONING_FORMS[1]
TOKENS = [
    "<think>",
    "\nHm",
    ", {",
    "}.\n",
    "</think>",
    "\n\n",
    "Let me {",
    " see",
    ".\n",
    "<tool_call>",
    '{"name": ',
    '"now"',
    "}",
]
OUTPUT = OutputFormat(form=tool_call_form("hermes"), reasoning=THINK)


def read(text: AnswerText, tokens: list[str]) -> tuple[str, str, list[CallDelta]]:
    """Feed tokens until the text stops; return its content, its reasoning and its calls."""
    content = ""
    for token in tokens:
        content += text.feed(token)
        if text.stopped:
            break
    else:
        content += text.flush()
    return content, *text.take()


@pytest.mark.parametrize(
    ("stops", "expected"), [([], "Let me { see."), (["{"], "Let me "), (["}", "name", "Hm"], "Let me { see.")]
)
def test_stop_strings_end_the_content_alone(stops: list[str], expected: str) -> None:
    text = AnswerText(OUTPUT, stops, include_stop=False)
    content, reasoning, calls = read(text, TOKENS)
    assert (content, reasoning) == (expected, "Hm, {}.")
    assert [call.name for call in calls] == ([] if stops == ["{"] else ["now"])
    assert text.calls == len(calls)
    # The markers belong to the reasoning.
    assert text.reasoning_tokens == 5
    assert text.stopped is (stops == ["{"])


def test_reasoning_that_the_prompt_has_begun() -> None:
    output = OutputFormat(reasoning=THINK, in_reasoning=True)
    text = AnswerText(output, ["see"], include_stop=True)
    assert read(text, TOKENS[1:9]) == ("Let me { see", "Hm, {}.", [])
    assert text.reasoning_tokens == 4
    unfinished = AnswerText(output, [], include_stop=False)
    assert read(unfinished, TOKENS[1:3]) == ("", "Hm, {", [])
    assert unfinished.reasoning_tokens == 2


def test_the_only_call_ends_the_text() -> None:
    output = OutputFormat(form=tool_call_form("hermes"), single_call=True)
    text = AnswerText(output, [], include_stop=False)
    content, _, calls = read(text, [*TOKENS[9:], "more"])
    assert (content, [call.arguments for call in calls]) == ("", ["{}"])
    assert text.stopped


@pytest.mark.parametrize("output", [PLAIN_TEXT, OUTPUT])
def test_previews_change_nothing(output: OutputFormat) -> None:
    text = AnswerText(output, ["stop"], include_stop=False)
    assert text.feed("Hello s") == "Hello "
    assert text.preview("um") == ("sum", False)
    assert text.preview("top and more") == ("", True)
    assert text.preview("um <tool_call>")[0] == ("sum" if output is OUTPUT else "sum <tool_call>")
    assert text.feed("un") == "sun"
    assert text.flush() == ""
    assert text.take() == ("", [])
