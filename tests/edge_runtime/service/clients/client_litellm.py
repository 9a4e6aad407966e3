"""LiteLLM, as `hosted_vllm`'s kin: any server of OpenAI's API under `openai/MODEL`."""

import os
from typing import Any

# Prices of models, which it would download.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
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


def ask(service: ServiceUnderTest, messages: list[Any] = MESSAGES, **fields: Any) -> Any:
    return litellm.completion(
        model=f"openai/{service.model}",
        messages=messages,
        api_base=service.base_url,
        api_key="none",
        num_retries=0,
        **({"temperature": 0} | fields),
    )


def check_list(service: ServiceUnderTest) -> None:
    names = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key="none", api_base=service.base_url
    )
    assert any(name.endswith(service.model) for name in names), names


def check_chat(service: ServiceUnderTest) -> None:
    answer = ask(service, max_tokens=LIMIT)
    assert answer.choices[0].message.content == service.text
    assert answer.usage.completion_tokens == LIMIT


def check_stream(service: ServiceUnderTest) -> None:
    chunks = ask(service, max_tokens=LIMIT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == service.text


def check_tools(service: ServiceUnderTest) -> None:
    answer = ask(service, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    check_arguments(call.function.arguments)


def check_structured(service: ServiceUnderTest) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    check_arguments(ask(service, response_format=form).choices[0].message.content)


def check_logprobs(service: ServiceUnderTest) -> None:
    tokens = ask(service, max_tokens=LIMIT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == service.text


def check_cancel(service: ServiceUnderTest) -> None:
    before = count_cancelled(service)
    stream = ask(service, stream=True, extra_body=ENDLESS)
    next(iter(stream))
    stream.completion_stream.close()
    wait_until_cancelled(service, before)


def check_history(service: ServiceUnderTest) -> None:
    history = [*MESSAGES, {"role": "assistant", "content": service.text}, {"role": "user", "content": "more"}]
    assert ask(service, history, max_tokens=LIMIT).usage.prompt_tokens > LIMIT


def check_errors(service: ServiceUnderTest) -> None:
    try:
        ask(service, [{"role": "user", "content": "x " * 9000}])
        raise AssertionError("a long prompt is an error")
    except litellm.ContextWindowExceededError:
        pass
    try:
        ask(service._replace(model="nobody"))
        raise AssertionError("an unknown model is an error")
    except litellm.NotFoundError:
        pass


def check_responses(service: ServiceUnderTest) -> None:
    answer = litellm.responses(
        model=f"openai/{service.model}",
        input=QUESTION,
        max_output_tokens=LIMIT,
        temperature=0,
        api_base=service.base_url,
        api_key="none",
    )
    assert answer.output[0].content[0].text == service.text


run()
