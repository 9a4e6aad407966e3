"""The `openai` package: chat completions, completions and responses."""

import openai
from contract import (
    ENDLESS,
    LIMIT,
    MESSAGES,
    QUESTION,
    TOOL,
    WEATHER,
    ServiceUnderTest,
    check_arguments,
    count_cancelled,
    run,
    wait_until_cancelled,
)


def connect(service: ServiceUnderTest) -> openai.OpenAI:
    return openai.OpenAI(base_url=service.base_url, api_key="none", max_retries=0)


def check_list(service: ServiceUnderTest) -> None:
    assert [model.id for model in connect(service).models.list()] == [service.model]


def check_chat(service: ServiceUnderTest) -> None:
    answer = connect(service).chat.completions.create(
        model=service.model, messages=MESSAGES, max_tokens=LIMIT, temperature=0
    )
    assert answer.choices[0].message.content == service.text
    assert answer.usage.completion_tokens == LIMIT


def check_stream(service: ServiceUnderTest) -> None:
    stream = connect(service).chat.completions.create(
        model=service.model,
        messages=MESSAGES,
        max_tokens=LIMIT,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == service.text
    assert chunks[-1].usage.completion_tokens == LIMIT


def check_tools(service: ServiceUnderTest) -> None:
    answer = connect(service).chat.completions.create(
        model=service.model, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    check_arguments(call.function.arguments)


def check_structured(service: ServiceUnderTest) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    answer = connect(service).chat.completions.create(model=service.model, messages=MESSAGES, response_format=form)
    check_arguments(answer.choices[0].message.content)


def check_logprobs(service: ServiceUnderTest) -> None:
    answer = connect(service).chat.completions.create(
        model=service.model, messages=MESSAGES, max_tokens=LIMIT, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == service.text
    assert all(token.top_logprobs[0].logprob == token.logprob for token in tokens)


def check_cancel(service: ServiceUnderTest) -> None:
    before = count_cancelled(service)
    with connect(service).chat.completions.create(
        model=service.model, messages=MESSAGES, stream=True, extra_body=ENDLESS
    ) as stream:
        next(iter(stream))
    wait_until_cancelled(service, before)


def check_history(service: ServiceUnderTest) -> None:
    history = [*MESSAGES, {"role": "assistant", "content": service.text}, {"role": "user", "content": "more"}]
    answer = connect(service).chat.completions.create(model=service.model, messages=history, max_tokens=LIMIT)
    assert answer.usage.prompt_tokens > LIMIT


def check_errors(service: ServiceUnderTest) -> None:
    client = connect(service)
    try:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
        raise AssertionError("an unknown model is an error")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    try:
        client.chat.completions.create(model=service.model, messages=[{"role": "user", "content": "x " * 9000}])
        raise AssertionError("a long prompt is an error")
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"


def check_responses(service: ServiceUnderTest) -> None:
    client = connect(service)
    fields = {"model": service.model, "max_output_tokens": LIMIT, "temperature": 0}
    first = client.responses.create(input=QUESTION, **fields)
    assert first.output_text == service.text
    events = list(client.responses.create(input=QUESTION, stream=True, **fields))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == service.text
    second = client.responses.create(input="more", previous_response_id=first.id, **fields)
    assert second.usage.input_tokens > first.usage.input_tokens + LIMIT


run()
