"""langchain-openai: `ChatOpenAI` over chat completions and over responses. It lists no models."""

from typing import Any

import openai
from contract import (
    ENDLESS,
    LIMIT,
    QUESTION,
    TOOL,
    WEATHER,
    ServiceUnderTest,
    check_arguments,
    count_cancelled,
    run,
    wait_until_cancelled,
)
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def connect(service: ServiceUnderTest, **fields: Any) -> ChatOpenAI:
    defaults = {"temperature": 0, "model": service.model, "base_url": service.base_url, "api_key": "none"}
    return ChatOpenAI(**(defaults | {"max_retries": 0} | fields))


def check_chat(service: ServiceUnderTest) -> None:
    answer = connect(service, max_tokens=LIMIT).invoke(QUESTION)
    assert answer.content == service.text
    assert answer.usage_metadata["output_tokens"] == LIMIT


def check_stream(service: ServiceUnderTest) -> None:
    chunks = list(connect(service, max_tokens=LIMIT).stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == service.text


def check_tools(service: ServiceUnderTest) -> None:
    model = connect(service).bind_tools([TOOL], tool_choice="get_weather")
    answer = model.invoke(QUESTION)
    (call,) = answer.tool_calls
    check_arguments(call["args"])
    result = ToolMessage("It rains.", tool_call_id=call["id"])
    following = connect(service, max_tokens=LIMIT).bind_tools([TOOL], tool_choice="auto")
    assert following.invoke([HumanMessage(QUESTION), answer, result]).usage_metadata["output_tokens"] <= LIMIT


def check_structured(service: ServiceUnderTest) -> None:
    schema = WEATHER | {"title": "weather", "description": "The weather."}
    for method in ("json_schema", "function_calling"):
        check_arguments(connect(service).with_structured_output(schema, method=method).invoke(QUESTION))


def check_logprobs(service: ServiceUnderTest) -> None:
    answer = connect(service, max_tokens=LIMIT, logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == service.text


def check_cancel(service: ServiceUnderTest) -> None:
    before = count_cancelled(service)
    stream = connect(service, extra_body=ENDLESS).stream(QUESTION)
    next(stream)
    stream.close()
    wait_until_cancelled(service, before)


def check_history(service: ServiceUnderTest) -> None:
    history = [HumanMessage(QUESTION), AIMessage(service.text), HumanMessage("more")]
    assert connect(service, max_tokens=LIMIT).invoke(history).usage_metadata["input_tokens"] > LIMIT


def check_errors(service: ServiceUnderTest) -> None:
    try:
        connect(service).invoke("x " * 9000)
        raise AssertionError("a long prompt is an error")
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"


def check_responses(service: ServiceUnderTest) -> None:
    model = connect(service, use_responses_api=True, max_tokens=LIMIT)
    assert model.invoke(QUESTION).text == service.text
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == service.text


run()
