"""Fixtures: a verifier of the toy target, the service as a process, and both in one event loop for fault tests."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FIXED_PLAN, FixedPlanner, Planner, Surroundings
from edge_runtime.protocol.bundle import CHAT_FILE, ChatFormat, read_bundle, record_file, write_manifest
from edge_runtime.service.app import Service
from edge_runtime.service.auth import AccessRules
from edge_runtime.service.chat_template import ChatTemplate, load_chat_template
from edge_runtime.service.state import BoardRuntime, ServiceLimits
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import FAMILY, ComputeOnce
from tests.edge_runtime.service.browser import Tab, chromium
from tests.emulator.answer_checker import AnswerCase, make_cases

if TYPE_CHECKING:
    import openai

    from cloud_verifier.api.server import VerifierServer
    from cloud_verifier.model.target import Target

BUNDLE = FAMILY / "bundle"


@pytest.fixture(scope="session")
def target(target_v1: Target) -> Target:
    return target_v1


@pytest.fixture(scope="session")
def draft(shipped_draft: OnnxDraft) -> OnnxDraft:
    return shipped_draft


@pytest.fixture(scope="session")
def answer_cases(compute_once: ComputeOnce) -> list[AnswerCase]:
    """Requests and their correct answers."""
    cases = compute_once("answer-cases", lambda: msgspec.json.encode(make_cases(FAMILY / "target-v1")))
    return msgspec.json.decode(cases, type=list[AnswerCase])


@contextlib.contextmanager
def board_process(verifier: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `edge-runtime serve` on a free port; yield its process and URL."""
    command = [sys.executable, "-m", "tests.event_loop_watchdog", "edge_runtime.cli", "serve", "--port", "0"]
    command += ["--verifier", verifier, "--bundle", str(BUNDLE), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def url(verifier: str) -> Iterator[str]:
    """URL of a service process with a plan that drafts."""
    options = ("--policy", "fixed", "--threads", "1", "--max-new-tokens", "32")
    with board_process(verifier, *options) as (_, address):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Tab]:
    """The page of the board, connected."""
    opened = Tab(browser, url)
    opened.wait_for_state("live")
    yield opened
    opened.close()


class RestartableVerifier:
    """A verifier that can be stopped and started again at the same address."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._port = 0
        self._server: VerifierServer | None = None

    async def start(self) -> None:
        from cloud_verifier.api.app import VerifierLimits, VerifierService
        from cloud_verifier.api.server import VerifierServer

        self._service = VerifierService(lambda: self._target, VerifierLimits())
        self._server = VerifierServer(self._service, ListenOptions(port=self._port))
        await self._server.start()
        self.url = self._server.url
        self._port = int(self.url.rsplit(":", 1)[1])

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server:
            await server.stop()

    @property
    def is_running(self) -> bool:
        return self._server is not None

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._service.sessions)


class ServicePair(msgspec.Struct):
    """A service, its verifier, and an OpenAI client of the service."""

    url: str
    service: Service
    verifier: RestartableVerifier
    client: openai.AsyncOpenAI


@contextlib.asynccontextmanager
async def service_pair(
    target: Target,
    draft: OnnxDraft,
    limits: ServiceLimits | None = None,
    *,
    keys: frozenset[str] = frozenset(),
    key: str = "none",
    deadline: float = 300.0,
    planner: Planner | None = None,
    chat_template: ChatTemplate | None = None,
    **board: Any,
) -> AsyncIterator[ServicePair]:
    """Run a service and its verifier in this event loop, for tests that look inside or cause faults.

    Args:
        board: other fields of `BoardRuntime`.
    """
    import openai

    verifier = RestartableVerifier(target)
    await verifier.start()
    try:
        async with VerifierClient(verifier.url, deadline=deadline) as client:
            service = Service(client, limits or ServiceLimits(), AccessRules(keys))
            server = HttpServer(service.app, ListenOptions(port=0))
            await server.start()
            try:
                fields: dict[str, Any] = {
                    "planner": planner or FixedPlanner(FIXED_PLAN),
                    "surroundings": Surroundings,
                    **board,
                }
                service.activate(BoardRuntime(draft, chat_template or load_chat_template(BUNDLE), **fields))
                async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as openai_client:
                    yield ServicePair(server.url, service, verifier, openai_client)
                await service.drain(0.0)
            finally:
                await server.stop()
    finally:
        await verifier.stop()


async def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until `condition()` is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        await asyncio.sleep(0.01)


def read_metric(pair: ServicePair, name: str) -> float:
    """Return the sum of the service's metrics whose name, with labels, starts with `name`."""
    lines = pair.service.metrics.render().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def write_chat_bundle(directory: Path, chat: ChatFormat | bytes) -> Path:
    """Write a copy of the toy bundle whose target is talked to in this way; return its directory."""
    bundle = directory / "bundle"
    shutil.copytree(BUNDLE, bundle)
    (bundle / CHAT_FILE).write_bytes(chat if isinstance(chat, bytes) else msgspec.json.encode(chat))
    manifest = read_bundle(bundle, verify=False).manifest
    files = manifest.files | {CHAT_FILE: record_file(bundle / CHAT_FILE)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    return bundle
