"""llm, configured as its documentation says: `extra-openai-models.yaml`."""

import json
import os
import tempfile
from pathlib import Path

# Where it keeps its configuration: not in the home of whoever runs the tests.
os.environ["LLM_USER_PATH"] = tempfile.mkdtemp(prefix="llm-")

import llm
from contract import (
    LIMIT,
    QUESTION,
    WEATHER,
    ServiceUnderTest,
    check_arguments,
    run,
)


def connect(service: ServiceUnderTest) -> llm.Model:
    model = {
        "model_id": "board",
        "model_name": service.model,
        "api_base": service.base_url,
        "supports_schema": True,
        "supports_tools": True,
    }
    # JSON is YAML.
    (Path(os.environ["LLM_USER_PATH"]) / "extra-openai-models.yaml").write_text(json.dumps([model]))
    return llm.get_model("board")


def check_chat(service: ServiceUnderTest) -> None:
    response = connect(service).prompt(QUESTION, max_tokens=LIMIT, temperature=0, stream=False)
    assert response.text() == service.text
    assert response.usage().output == LIMIT


def check_stream(service: ServiceUnderTest) -> None:
    assert "".join(connect(service).prompt(QUESTION, max_tokens=LIMIT, temperature=0)) == service.text


def check_tools(service: ServiceUnderTest) -> None:
    tool = llm.Tool(name="get_weather", description="The weather.", input_schema=WEATHER)
    response = connect(service).prompt(QUESTION, tools=[tool], max_tokens=LIMIT, temperature=0, stream=False)
    # The target is free to call or not, and knows nothing of tools.
    assert response.tool_calls() or response.text()


def check_structured(service: ServiceUnderTest) -> None:
    check_arguments(connect(service).prompt(QUESTION, schema=WEATHER).text())


def check_history(service: ServiceUnderTest) -> None:
    conversation = connect(service).conversation()
    first = conversation.prompt(QUESTION, max_tokens=LIMIT, temperature=0)
    first.text()
    second = conversation.prompt("more", max_tokens=LIMIT, temperature=0)
    second.text()
    assert second.usage().input > first.usage().input + LIMIT


def check_errors(service: ServiceUnderTest) -> None:
    try:
        connect(service).prompt("x " * 9000).text()
        raise AssertionError("a long prompt is an error")
    except Exception as error:
        assert "maximum context length" in str(error), error


run()
