"""What every client is asked. Runs in the clients' own environment, which has nothing of this project.

A client's script calls `run`, which runs its checks; the name of each check that passed is printed. `test_clients` runs
the scripts: `python CLIENT.py '{"url": ..., "model": ..., "text": ...}'`.
"""

import json
import sys
import time
import urllib.request
from typing import Any, NamedTuple

QUESTION = "import os"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
# Below 16, OpenAI refuses `max_output_tokens`, and LiteLLM raises them to it.
LIMIT = 16
WEATHER = {
    "type": "object",
    "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}}
# The answer continues until the context is full, so that there is something to cancel.
ENDLESS = {"ignore_eos": True}


class ServiceUnderTest(NamedTuple):
    """The service that is asked.

    Attributes:
        url: of the service, without `/v1`.
        model: the id of its model.
        text: the greedy answer to QUESTION, of LIMIT tokens.
    """

    url: str
    model: str
    text: str

    @property
    def base_url(self) -> str:
        """What clients are configured with."""
        return f"{self.url}/v1"


def run() -> None:
    """Run the checks of the program, its own functions `check_NAME`; the first that fails ends it."""
    service = ServiceUnderTest(**json.loads(sys.argv[1]))
    for name, check in list(vars(sys.modules["__main__"]).items()):
        if name.startswith("check_") and check.__module__ == "__main__":
            check(service)
            print(name.removeprefix("check_"), flush=True)


def count_cancelled(service: ServiceUnderTest) -> float:
    """Return how many answers were cancelled so far."""
    with urllib.request.urlopen(f"{service.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'outcome="cancelled"' in line)


def wait_until_cancelled(service: ServiceUnderTest, before: float) -> None:
    """Wait until one more answer is cancelled. Raises TimeoutError."""
    end = time.monotonic() + 60
    while count_cancelled(service) <= before:
        if time.monotonic() > end:
            raise TimeoutError("the answer was not cancelled")
        time.sleep(0.02)


def check_arguments(arguments: str | dict[str, Any]) -> None:
    """Check the arguments of a call of TOOL, or JSON of its schema."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert value.keys() == {"place", "days"}, value
    assert value["place"] in ("Rome", "Oslo"), value
    assert value["days"] in (1, 2), value
