"""instructor, which is for structured output: by tools and by JSON schemas, whole and in parts."""

from typing import Literal

import instructor
import openai
from contract import MESSAGES, ServiceUnderTest, check_arguments, run
from pydantic import BaseModel


class Weather(BaseModel):
    place: Literal["Rome", "Oslo"]
    days: Literal[1, 2]


def connect(service: ServiceUnderTest, mode: instructor.Mode) -> instructor.Instructor:
    client = openai.OpenAI(base_url=service.base_url, api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode)


def ask_in_mode(service: ServiceUnderTest, mode: instructor.Mode) -> None:
    weather = connect(service, mode).create(
        model=service.model, messages=MESSAGES, response_model=Weather, max_retries=0
    )
    check_arguments(weather.model_dump())


def check_tools(service: ServiceUnderTest) -> None:
    ask_in_mode(service, instructor.Mode.TOOLS)


def check_structured(service: ServiceUnderTest) -> None:
    ask_in_mode(service, instructor.Mode.JSON_SCHEMA)


def check_stream(service: ServiceUnderTest) -> None:
    parts = connect(service, instructor.Mode.TOOLS).create_partial(
        model=service.model, messages=MESSAGES, response_model=Weather, max_retries=0
    )
    check_arguments(list(parts)[-1].model_dump())


def check_errors(service: ServiceUnderTest) -> None:
    try:
        check_structured(service._replace(model="nobody"))
        raise AssertionError("an unknown model is an error")
    except Exception as error:
        assert "no model" in str(error) or "model_not_found" in str(error), error


run()
