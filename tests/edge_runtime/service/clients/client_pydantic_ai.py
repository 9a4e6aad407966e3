"""pydantic-ai: agents over chat completions and over responses. It lists no models."""

import asyncio
from typing import Any, Literal

from contract import (
    ENDLESS,
    LIMIT,
    QUESTION,
    ServiceUnderTest,
    check_arguments,
    count_cancelled,
    run,
    wait_until_cancelled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    place: Literal["Rome", "Oslo"]
    days: Literal[1, 2]


def make_agent(service: ServiceUnderTest, *, kind: Any = OpenAIChatModel, output: Any = str, **settings: Any) -> Any:
    client = AsyncOpenAI(base_url=service.base_url, api_key="none", max_retries=0)
    model = kind(service.model, provider=OpenAIProvider(openai_client=client))
    return Agent(model, output_type=output, model_settings={"temperature": 0, **settings})


def check_chat(service: ServiceUnderTest) -> None:
    result = make_agent(service, max_tokens=LIMIT).run_sync(QUESTION)
    assert result.output == service.text


async def read_stream(service: ServiceUnderTest) -> str:
    async with make_agent(service, max_tokens=LIMIT).run_stream(QUESTION) as result:
        return "".join([piece async for piece in result.stream_text(delta=True, debounce_by=None)])


def check_stream(service: ServiceUnderTest) -> None:
    assert asyncio.run(read_stream(service)) == service.text


def check_tools(service: ServiceUnderTest) -> None:
    weather = make_agent(service, output=ToolOutput(Weather)).run_sync(QUESTION).output
    check_arguments(weather.model_dump())


def check_structured(service: ServiceUnderTest) -> None:
    weather = make_agent(service, output=NativeOutput(Weather)).run_sync(QUESTION).output
    check_arguments(weather.model_dump())


def check_logprobs(service: ServiceUnderTest) -> None:
    settings = {"openai_logprobs": True, "openai_top_logprobs": 2}
    result = make_agent(service, max_tokens=LIMIT, **settings).run_sync(QUESTION)
    tokens = result.all_messages()[-1].provider_details["logprobs"]
    assert "".join(token["token"] for token in tokens) == service.text


async def cancel(service: ServiceUnderTest) -> None:
    async with make_agent(service, extra_body=ENDLESS).run_stream(QUESTION) as result:
        async for _ in result.stream_text(delta=True, debounce_by=None):
            break


def check_cancel(service: ServiceUnderTest) -> None:
    before = count_cancelled(service)
    asyncio.run(cancel(service))
    wait_until_cancelled(service, before)


def check_history(service: ServiceUnderTest) -> None:
    agent = make_agent(service, max_tokens=LIMIT)
    first = agent.run_sync(QUESTION)
    second = agent.run_sync("more", message_history=first.all_messages())
    assert second.all_messages()[-1].usage.input_tokens > first.usage.input_tokens + LIMIT


def check_errors(service: ServiceUnderTest) -> None:
    try:
        make_agent(service).run_sync("x " * 9000)
        raise AssertionError("a long prompt is an error")
    except ModelHTTPError as error:
        assert error.status_code == 400
        assert error.body["code"] == "context_length_exceeded"


def check_responses(service: ServiceUnderTest) -> None:
    text = make_agent(service, kind=OpenAIResponsesModel, max_tokens=LIMIT).run_sync(QUESTION)
    assert text.output == service.text
    weather = make_agent(service, kind=OpenAIResponsesModel, output=ToolOutput(Weather)).run_sync(QUESTION).output
    check_arguments(weather.model_dump())


run()
