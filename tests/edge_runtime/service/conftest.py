"""A verifier of the shipped target, the service in a process of its own, and both in one event loop for faults."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import torch

from cloud_verifier.api import app as cloud
from cloud_verifier.api.server import VerifierServer as Verifier
from cloud_verifier.model.target import Target
from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner, Planner, Surroundings
from edge_runtime.service.app import Service
from edge_runtime.service.chat_template import ChatTemplate, load_chat_template
from edge_runtime.service.state import BoardRuntime, ServiceLimits
from edge_runtime.verifier.client import VerifierClient
from tests.cloud_verifier.protocol_client import running
from tests.conftest import FAMILY

BUNDLE = FAMILY / "bundle"


@pytest.fixture(scope="session")
def target() -> Target:
    return Target(FAMILY / "target-v1", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def draft() -> OnnxDraft:
    return OnnxDraft.load(BUNDLE, threads=1)


@pytest.fixture(scope="session")
def verifier(target: Target) -> Iterator[str]:
    """The URL of a verifier, for all tests that do it no harm."""
    with running(target) as url:
        yield url


@contextlib.contextmanager
def board_process(verifier: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`edge-runtime serve` on a free port; its process and URL."""
    command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--port", "0", "--verifier", verifier, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def url(verifier: str) -> Iterator[str]:
    """A board in a process of its own, with a plan that drafts."""
    # What is drafted must not depend on which test came before.
    options = ("--policy", "fixed", "--no-ngram-cache", "--threads", "1", "--max-new-tokens", "32")
    with board_process(verifier, *options) as (_, address):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as talking:
        yield talking


class Cloud:
    """A verifier that can be stopped, and started again at the same address."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._port = 0
        self._server: Verifier | None = None

    async def start(self) -> None:
        self._service = cloud.VerifierService(lambda: self._target, cloud.VerifierLimits())
        self._server = Verifier(self._service, ListenOptions(port=self._port))
        await self._server.start()
        self.url = self._server.url
        self._port = int(self.url.rsplit(":", 1)[1])

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server:
            await server.stop()

    @property
    def sessions(self) -> int:
        """How many there are."""
        return len(self._service.sessions)


class Both(msgspec.Struct):
    """A board and its verifier."""

    url: str
    service: Service
    cloud: Cloud
    client: openai.AsyncOpenAI


@contextlib.asynccontextmanager
async def both(
    target: Target,
    draft: OnnxDraft,
    limits: ServiceLimits | None = None,
    *,
    keys: frozenset[str] = frozenset(),
    key: str = "none",
    deadline: float = 30.0,
    planner: Planner | None = None,
    chat: ChatTemplate | None = None,
    **board: Any,
) -> AsyncIterator[Both]:
    """A board and its verifier in this event loop, for whoever wants to look inside or break something.

    Args:
        board: other fields of `BoardRuntime`.
    """
    verifier = Cloud(target)
    await verifier.start()
    try:
        async with VerifierClient(verifier.url, deadline=deadline) as client:
            service = Service(client, limits or ServiceLimits(), keys)
            server = HttpServer(service.app, ListenOptions(port=0))
            await server.start()
            try:
                fields: dict[str, Any] = {"surroundings": Surroundings, **board}
                service.activate(
                    BoardRuntime(
                        draft, chat or load_chat_template(BUNDLE), planner or FixedPlanner(FIXED_PLAN), **fields
                    )
                )
                async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as talking:
                    yield Both(server.url, service, verifier, talking)
                await service.drain(0.0)
            finally:
                await server.stop()
    finally:
        await verifier.stop()


def bundle_with(directory: Path, **files: str) -> Path:
    """A directory with these files, named as in a bundle."""
    names = {"template": "chat_template.jinja", "config": "tokenizer_config.json"}
    for name, text in files.items():
        (directory / names[name]).write_text(text)
    return directory
