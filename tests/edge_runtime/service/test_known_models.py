"""Models are listed at once, also without a verifier; a request that is not streamed learns why it gets no answer."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.service.known_models import KnownModels
from edge_runtime.service.state import ServiceLimits
from edge_runtime.verifier import VerifierClient
from tests.edge_runtime.service.conftest import ServicePair, service_pair, wait_until

NOWHERE = "http://127.0.0.1:1"


async def stop_verifier(pair: ServicePair) -> None:
    """Stop the verifier, and let the client notice."""
    await pair.verifier.stop()
    for _ in range(5):
        await pair.service.client.check()
    assert pair.service.client.link_state.reachable is False


@pytest.mark.slow
async def test_models_stay_known_without_a_verifier(target: Target, draft: OnnxDraft, tmp_path: Path) -> None:
    file = tmp_path / "state" / "models.json"
    async with service_pair(target, draft) as pair:
        models = KnownModels(pair.service.client, file)
        assert models.context_of("") == 0
        (model,) = (await models.fetch()).data
        assert (model.id, model.context) == ("target-v1", target.context)
        assert {models.context_of(name) for name in ("", model.id, model.version)} == {target.context}
        assert models.context_of("other") == 0
        await wait_until(file.is_file)
        await stop_verifier(pair)
        assert (await models.fetch()).data == [model]
        # After a restart, for the same verifiers.
        assert (await KnownModels(pair.service.client, file).fetch()).data == [model]
        async with VerifierClient(NOWHERE, deadline=1.0) as other:
            with pytest.raises(VerifierUnreachable):
                await KnownModels(other, file).fetch()


async def test_a_version_that_is_not_listed_is_a_reason_to_ask_once(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        models, client = pair.service.state.models, pair.service.client
        assert models.context_of("") == 0
        await pair.client.completions.create(model="", prompt="x", max_tokens=1)
        await wait_until(lambda: models.context_of("") == target.context)
        first = client.latest_models
        for version in ("target-v2@1", "target-v2@1", target.version):
            models.notice(version)
        await wait_until(lambda: client.latest_models is not first)
        second = client.latest_models
        models.notice("target-v2@1")
        await pair.client.completions.create(model="", prompt="x", max_tokens=1)
        assert client.latest_models is second


async def test_without_anything_else_the_configured_model_is_known(tmp_path: Path) -> None:
    async with VerifierClient(NOWHERE, deadline=0.2) as client:
        damaged = tmp_path / "models.json"
        damaged.write_text("{")
        (model,) = (await KnownModels(client, damaged).fetch("my-model")).data
        assert (model.id, model.version, model.context) == ("my-model", "", 0)


@pytest.mark.slow
async def test_a_request_that_is_not_streamed_fails_with_the_reason(
    target: Target, draft: OnnxDraft, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edge_runtime.service")
    async with service_pair(target, draft, ServiceLimits(unreachable_seconds=0.3)) as pair:
        await stop_verifier(pair)
        with pytest.raises(openai.InternalServerError) as caught:
            await pair.client.completions.create(model="", prompt="x", max_tokens=4)
        assert (caught.value.status_code, caught.value.code) == (503, "connection_refused")
        assert "no verifier can be used since" in str(caught.value)
        assert any("503, no verifier can be used since" in message for message in caplog.messages)
        # The session of the answer may still be opening, so that it ends later; its line in the log says why, too.
        await wait_until(lambda: any(message.startswith("connection_refused: 0 tokens") for message in caplog.messages))
        assert not pair.service.queue.running


async def test_a_verifier_that_comes_back_in_time_answers(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft, ServiceLimits(unreachable_seconds=60.0)) as pair:
        await stop_verifier(pair)
        answer = asyncio.create_task(pair.client.completions.create(model="", prompt="x", max_tokens=4))
        await wait_until(lambda: pair.service.queue.running == 1)
        begun = time.monotonic()
        await pair.verifier.start()
        assert (await answer).usage.completion_tokens >= 1
        assert time.monotonic() - begun < 60
