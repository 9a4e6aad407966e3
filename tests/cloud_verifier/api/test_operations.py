"""Operations: metrics, log, load shedding, drain, and reload."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_verifier.api.app import VerifierLimits, VerifierService
from cloud_verifier.api.server import VerifierServer
from cloud_verifier.engine.admission import AdmissionController
from cloud_verifier.engine.metrics import MAX_DRAFTS, VerifierMetrics
from cloud_verifier.engine.sessions import RoundReply
from cloud_verifier.model.target import Target
from edge_runtime.common import logs
from edge_runtime.common.http_server import ListenOptions
from edge_runtime.common.metrics import OTHER_VALUE
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierError, VerifierRefused
from edge_runtime.protocol.messages import MSGPACK, PROTOCOL_VERSION, ErrorCode, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.session import VerifierSession
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ObservedTarget,
    ProtocolClient,
    decode_error,
    opening,
    running,
)
from tests.conftest import serving

ENDLESS = Sampling(ignore_eos=True)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: str) -> Samples:
    """Parse a metrics page into values by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def metric(found: Samples, metric: str, **labels: str) -> float:
    return found[f"flexspec_{metric}", frozenset(labels.items())]


# Metrics


def test_metrics_of_a_session(tiny: Target, reference_text: ReferenceText) -> None:
    truth, identity, version = reference_text(PROMPT, 20, ENDLESS), tiny.shared_identity("anchor", 1), tiny.version
    with running(tiny) as url, ProtocolClient(url) as client:
        session = client.open(sampling=ENDLESS, identity=identity)
        session.run_round(draft=[*truth[1:4], (truth[4] + 1) % 300], siblings={3: [truth[4]]})
        session.run_round(draft=truth[len(session.ids) - 4 :][:2], n=3)
        session.run_round(n=2)
        client.expect_error(client.post(session.path, session.next_round(round=9)), 409, ErrorCode.ROUND_OUT_OF_ORDER)
        found = samples(httpx.get(f"{url}/metrics").text)
    assert metric(found, "spec_decode_num_drafts_total", version=version) == 2
    assert metric(found, "spec_decode_num_draft_tokens_total", version=version) == 6
    assert metric(found, "spec_decode_num_accepted_tokens_total", version=version) == 5
    per_position = [
        metric(found, "spec_decode_num_accepted_tokens_per_pos_total", version=version, position=str(index))
        for index in range(3)
    ]
    assert per_position == [2, 2, 1]
    assert metric(found, "spec_decode_num_sibling_hits_total", version=version) == 1
    assert metric(found, "draft_tokens_total", draft=identity) == 6
    assert metric(found, "draft_accepted_tokens_total", draft=identity) == 5
    assert metric(found, "own_tokens_total", version=version) == len(session.ids) - 4 - 5
    assert metric(found, "principal_tokens_total", name="none") == len(session.ids) - 4
    assert metric(found, "refusals_total", code=ErrorCode.ROUND_OUT_OF_ORDER) == 1
    assert metric(found, "prompt_tokens_total") == 4
    assert metric(found, "queue_seconds_count") == metric(found, "round_seconds_count") == 4
    assert metric(found, "round_overhead_seconds_sum") <= metric(found, "round_seconds_sum")
    assert metric(found, "forward_seconds_count") >= 4
    assert (
        metric(found, "forward_sessions_count")
        == metric(found, "forward_rows_count")
        == metric(found, "forward_seconds_count")
    )
    assert (metric(found, "sessions"), metric(found, "session_limit"), metric(found, "rounds_running")) == (1, 256, 0)
    assert (metric(found, "cache_tokens"), metric(found, "draining")) == (len(session.ids), 0)
    assert metric(found, "session_evictions_total") == 0


def test_label_values_chosen_by_clients_are_bounded() -> None:
    metrics = VerifierMetrics()
    request, reply = RoundRequest(PROTOCOL_VERSION, 1, 5, [1]), Frame(PROTOCOL_VERSION, 1, 1, [2])
    for index in range(3 * MAX_DRAFTS):
        metrics.observe_round(
            version="v1",
            draft=f"draft-{index}",
            principal="",
            request=request,
            reply=reply,
            seconds=0.01,
            verified=True,
        )
    found = samples(metrics.render().decode())
    names = [dict(labels)["draft"] for name, labels in found if name == "flexspec_draft_tokens_total"]
    assert len(names) == MAX_DRAFTS + 1
    assert metric(found, "draft_tokens_total", draft=OTHER_VALUE) == 2 * MAX_DRAFTS


# The log


def test_the_log_contains_the_request_id_and_no_tokens_of_texts(tiny: Target, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cloud_verifier")
    prompt = [231, 232, 233, 234]
    with running(tiny) as url, ProtocolClient(url) as client:
        client.http.headers["x-request-id"] = "board-7/answer-12"
        session = client.open(prompt)
        response = client.post(session.path, session.next_round())
        assert response.headers["x-request-id"] == "board-7/answer-12"
        client.http.headers["x-request-id"] = "invalid; " + "x" * 100
        assert "x-request-id" not in client.post(session.path, session.next_round(round=5)).headers
        del client.http.headers["x-request-id"]
        assert "x-request-id" not in client.post(session.path, session.next_round(round=6)).headers
    lines = [record for record in caplog.records if record.name == "cloud_verifier.api.access_log"]
    fields = [getattr(record, logs.EXTRA_FIELDS) for record in lines]
    assert [record.levelname for record in lines] == ["INFO", "DEBUG", "INFO", "INFO"]
    assert [each["FLEXSPEC_REQUEST_ID"] for each in fields[:2]] == ["board-7/answer-12"] * 2
    assert len({each["FLEXSPEC_REQUEST_ID"] for each in fields}) == 3
    assert [each["FLEXSPEC_CODE"] for each in fields] == ["", "", *["round_out_of_order"] * 2]
    logged = " ".join(record.getMessage() + str(getattr(record, logs.EXTRA_FIELDS)) for record in lines)
    assert session.id not in logged
    # Whole numbers: times and random ids may have the same digits.
    assert not set(re.findall(r"(?<![\w.])\d+(?![\w.])", logged)) & set(map(str, prompt))


# Overload


@pytest.mark.slow
async def test_load_is_shed_while_rounds_wait_too_long(tiny: Target, reference_text: ReferenceText) -> None:
    target = ObservedTarget(tiny)
    headers = {"content-type": MSGPACK}
    async with (
        serving(target, VerifierLimits(max_queue_seconds=0.6)) as server,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=TIMEOUT_SECONDS) as client,
    ):

        async def open_one(seed: int) -> httpx.Response:
            request = opening([5, seed + 1], Sampling(1.0, seed=seed, ignore_eos=True))
            return await client.post("/v1/sessions", content=messages.encode(request, MSGPACK))

        async def run_round(session: str) -> httpx.Response:
            body = messages.encode(RoundRequest(PROTOCOL_VERSION, 1, 3), MSGPACK, session)
            return await client.post(f"/v1/sessions/{session}/rounds", content=body)

        opened = [messages.decode((await open_one(seed)).content, messages.OpenReply, MSGPACK) for seed in range(9)]
        target.hold()
        waiting = [asyncio.create_task(run_round(reply.session)) for reply in opened[:8]]
        while server.service.admission.waiting < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # From now on the oldest round has waited for more than half of the limit, however slow the machine is.
        await asyncio.sleep(0.4)
        refused = await open_one(99)
        assert (refused.status_code, decode_error(refused).code) == (503, ErrorCode.OVERLOADED)
        assert refused.headers["retry-after"] == "1"
        # Running sessions are refused only when the whole limit has passed.
        await asyncio.sleep(0.4)
        refused = await run_round(opened[8].session)
        assert (refused.status_code, decode_error(refused).code) == (503, ErrorCode.OVERLOADED)
        assert (await client.get("/healthz")).status_code == 200
        target.release()
        for seed, answer in enumerate(await asyncio.gather(*waiting)):
            tokens = (
                opened[seed].first.tokens + messages.decode(answer.content, Frame, MSGPACK, opened[seed].session).tokens
            )
            assert tokens == reference_text([5, seed + 1], 2, Sampling(1.0, seed=seed, ignore_eos=True))
        assert (await open_one(60)).status_code == (await run_round(opened[8].session)).status_code == 200


async def test_the_prefill_of_its_own_prompt_does_not_count_as_waiting() -> None:
    admission = AdmissionController(0.2)

    def register(prompt_tokens: int) -> RoundReply:
        reply = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, 1))
        admission.register(reply, prompt_tokens)
        return reply

    first = register(100)
    first.push(Frame(PROTOCOL_VERSION, 0, tokens=[1], prefill_100us=500))
    admission.unregister(first, 100)
    # 0.5 ms per token: the long prompt takes a second to prefill, which is not waiting.
    replies = [register(2000), *[register(10) for _ in range(5)]]
    await asyncio.sleep(0.15)
    admission.check(opening=True)
    replies[0].push(Frame(PROTOCOL_VERSION, 0, tokens=[1]))
    with pytest.raises(VerifierRefused, match="try again shortly"):
        admission.check(opening=True)
    # Rounds of running sessions are not affected.
    admission.check(opening=False)
    assert admission.waiting == 5
    for reply in replies:
        reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[1]))
    admission.check(opening=True)


async def test_whoever_sends_many_prompts_is_refused_before_others() -> None:
    admission = AdmissionController(0.1)

    def register(owner: str) -> None:
        admission.register(RoundReply(RoundRequest(PROTOCOL_VERSION, 0, 1)), 1000, owner)

    measured = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, 1))
    admission.register(measured, 1)
    measured.push(Frame(PROTOCOL_VERSION, 0, tokens=[1]))
    admission.unregister(measured, 1)
    for _ in range(10_000):
        register("flood")
    await asyncio.sleep(0.1)
    with pytest.raises(VerifierRefused, match="try again shortly"):
        admission.check(opening=True, owner="flood")
    admission.check(opening=True, owner="small")
    # Many who wait for one each are too many for a newcomer, too.
    for index in range(5):
        register(f"small {index}")
    await asyncio.sleep(0.1)
    with pytest.raises(VerifierRefused, match="try again shortly"):
        admission.check(opening=True, owner="small")


# Drain


@contextlib.asynccontextmanager
async def draining_service(target: Target) -> AsyncIterator[tuple[VerifierService, VerifierServer]]:
    service = VerifierService(lambda: target, VerifierLimits())
    server = VerifierServer(service, ListenOptions(port=0))
    await server.start()
    try:
        yield service, server
    finally:
        await server.stop()


@pytest.mark.slow
async def test_a_drain_finishes_running_rounds_and_refuses_new_ones(
    tiny: Target, reference_text: ReferenceText
) -> None:
    truth = reference_text(PROMPT, 402, ENDLESS)
    async with draining_service(tiny) as (service, server), VerifierClient(server.url) as client:
        session = VerifierSession(client, PROMPT, ENDLESS)
        other = VerifierSession(client, PROMPT, ENDLESS)
        await anext(other.run_round([]))
        running_round = session.run_round([], n=400, stream=True)
        await anext(running_round)
        drain = asyncio.create_task(service.admission.drain(TIMEOUT_SECONDS))
        await asyncio.sleep(0)
        async with httpx.AsyncClient(base_url=server.url) as http:
            ready = await http.get("/readyz")
            assert (ready.status_code, decode_error(ready).code) == (503, ErrorCode.DRAINING)
            assert ready.headers["retry-after"] == "1"
            assert (await http.get("/healthz")).status_code == 200
            assert metric(samples((await http.get("/metrics")).text), "draining") == 1
            # A recorded reply is still available.
            repeated = messages.encode(RoundRequest(PROTOCOL_VERSION, 0, 4), MSGPACK, other._id)
            assert (await http.post(f"/v1/sessions/{other._id}/rounds", content=repeated)).status_code == 200
        client.deadline = 4.0
        with pytest.raises(VerifierRefused, match="shutting down"):
            await anext(other.run_round([]))
        async for _ in running_round:
            pass
        assert await drain
        assert session.ids == PROMPT + truth[:400]


async def test_a_drain_has_a_time_limit(tiny: Target) -> None:
    target = ObservedTarget(tiny)
    async with draining_service(target) as (service, server), VerifierClient(server.url) as client:
        target.hold()
        running_round = asyncio.create_task(anext(VerifierSession(client, PROMPT, ENDLESS).run_round([])))
        assert await asyncio.to_thread(target.reached.wait, TIMEOUT_SECONDS)
        assert not await service.admission.drain(0.1)
        assert len(service.admission) == 1
        target.release()
        await running_round
        assert await service.admission.drain(TIMEOUT_SECONDS)


async def test_a_board_continues_at_its_next_verifier_when_one_drains(
    tiny: Target, reference_text: ReferenceText
) -> None:
    async with (
        draining_service(tiny) as (first, one),
        draining_service(tiny) as (_, another),
        VerifierClient([one.url, another.url]) as client,
    ):
        session = VerifierSession(client, PROMPT, ENDLESS)
        async for _ in session.run_round([1, 2], n=5):
            pass
        assert await first.admission.drain(TIMEOUT_SECONDS)
        for _ in range(3):
            async for _ in session.run_round([1, 2], n=5):
                pass
        assert (session.recoveries, client.retries) == (1, 1)
        assert client.url == another.url
        assert session.ids == PROMPT + reference_text(PROMPT, len(session.ids) - 4, ENDLESS)


@pytest.mark.slow
async def test_a_board_waits_for_its_only_verifier_to_return(tiny: Target, reference_text: ReferenceText) -> None:
    async with (
        draining_service(tiny) as (service, server),
        VerifierClient(server.url, deadline=TIMEOUT_SECONDS) as client,
    ):
        session = VerifierSession(client, PROMPT, ENDLESS)
        async for _ in session.run_round([], n=5):
            pass
        await service.admission.drain(5)
        asyncio.get_running_loop().call_later(1.0, setattr, service.admission, "draining", False)
        async for _ in session.run_round([], n=5):
            pass
        assert session.ids == PROMPT + reference_text(PROMPT, 10, ENDLESS)
        assert 1 <= client.retries <= 5


@pytest.mark.slow
def test_sigterm_cuts_off_no_round_and_ends_the_process_despite_an_idle_connection(
    tiny: Target, tiny_path: Path, reference_text: ReferenceText
) -> None:
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(tiny_path), "--port", "0", "--threads", "1"]
    # Enough for a busy machine.
    command += ["--grace", str(TIMEOUT_SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line, cache = process.stdout.readline(), process.stdout.readline()
            assert line.startswith(f"cloud-verifier: {tiny.version} on http://127.0.0.1:")
            assert re.fullmatch(r"cloud-verifier: KV cache of at most \d+ tokens, \d+\.\d\d GiB\n", cache)
            url = line.split()[-1]

            async def generate() -> list[int]:
                async with VerifierClient(url) as client:
                    session = VerifierSession(client, PROMPT, ENDLESS)
                    running_round = session.run_round([], n=450, stream=True)
                    await anext(running_round)
                    process.send_signal(signal.SIGTERM)
                    async for _ in running_round:
                        pass
                    client.deadline = 0.5
                    # Refused with `draining`, or the process has ended already.
                    with pytest.raises(VerifierError):
                        await anext(session.run_round([]))
                    return session.ids

            with httpx.Client(http1=False, http2=True) as idle:
                assert idle.get(f"{url}/readyz").status_code == 200
                assert asyncio.run(generate()) == PROMPT + reference_text(PROMPT, 450, ENDLESS)
                out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_sighup_reloads_the_token_file_and_the_log_is_json(tiny_path: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"

    def cli(*words: str) -> str:
        command = [sys.executable, "-m", "cloud_verifier.cli", "token", *words, "--tokens", str(tokens)]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        ).stdout.strip()

    first = cli("add", "one")
    command = [sys.executable, "-m", "cloud_verifier.cli", "--log-level", "info", "--log-format", "json"]
    command += ["serve", str(tiny_path), "--port", "0", "--threads", "1", "--tokens", str(tokens)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **streams, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]

            def status(token: str) -> int:
                return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {token}"}).status_code

            assert (status(first), status("other")) == (200, 401)
            second = cli("add", "two")
            assert status(second) == 401
            cli("revoke", "one")
            os.kill(process.pid, signal.SIGHUP)
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while status(second) != 200 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (status(first), status(second)) == (401, 200)
            tokens.write_text("broken")
            os.kill(process.pid, signal.SIGHUP)
            time.sleep(0.5)
            assert status(second) == 200
            process.terminate()
            _, err = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert any("is not TOML" in line["message"] and line["level"] == "error" for line in lines)
    refused = next(line for line in lines if line.get("flexspec_code") == "unauthorized")
    assert (refused["logger"], refused["flexspec_status"]) == ("cloud_verifier.api.access_log", 401)
    assert first not in err and second not in err
