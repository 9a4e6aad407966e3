"""Real clients against the service: each in its own program, in an environment that `make clients` makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients_environment import NODE_MODULES, require_python
from tests.edge_runtime.service.conftest import board_process

SCRIPTS = Path(__file__).parent
ALL = {"list", "chat", "stream", "tools", "structured", "logprobs", "cancel", "history", "errors", "responses"}
# What each client can do: most list no models, instructor is for structured output, llm gives no log-probabilities.
CHECKS = {
    "openai": ALL,
    "litellm": ALL,
    "langchain": ALL - {"list"},
    "pydantic_ai": ALL - {"list"},
    "instructor": {"stream", "tools", "structured", "errors"},
    "llm": ALL - {"list", "logprobs", "cancel", "responses"},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(verifier: str) -> Iterator[str]:
    """The argument of the scripts: a service whose answers have no limit but the request's."""
    with board_process(verifier, "--policy", "fixed", "--threads", "1") as (_, url):
        # What the target says without speculation.
        body = {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 16, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"speculation": False}, timeout=None).json()
        text = answer["choices"][0]["message"]["content"]
        yield json.dumps({"url": url, "model": answer["model"], "text": text})


def run_client(command: list[str | Path], service: str, directory: Path) -> set[str]:
    """Return the names of the checks that passed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    done = subprocess.run(
        [*command, service], capture_output=True, text=True, cwd=directory, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ALL & set(done.stdout.splitlines())


@pytest.mark.parametrize("client", CHECKS)
def test_a_client_gets_what_it_asks_for(client: str, service: str, tmp_path: Path) -> None:
    assert run_client([require_python(), SCRIPTS / f"client_{client}.py"], service, tmp_path) == CHECKS[client]


# Not skipped without Node.js: it is no part of what CI needs.
if NODE_MODULES.is_dir() and shutil.which("node"):

    def test_javascript_clients_get_what_they_ask_for(service: str, tmp_path: Path) -> None:
        # An import of JavaScript is looked for beside the script.
        (tmp_path / "node_modules").symlink_to(NODE_MODULES)
        script = Path(shutil.copy(SCRIPTS / "client_javascript.mjs", tmp_path))
        assert run_client(["node", script], service, tmp_path) == ALL
