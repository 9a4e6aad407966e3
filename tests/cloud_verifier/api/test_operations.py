"""A verifier at work: what it counts, what it logs, how it sheds load, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
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
from tests.cloud_verifier.protocol_client import PROMPT, ObservedTarget, ProtocolClient, decode_error, opening, running
from tests.conftest import serving

ENDLESS = Sampling(ignore_eos=True)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: str) -> Samples:
    """Values by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def of(found: Samples, metric: str, **labels: str) -> float:
    return found[f"flexspec_{metric}", frozenset(labels.items())]


# Metrics


def test_what_prometheus_is_told(tiny: Target, reference_text: ReferenceText) -> None:
    truth, identity, version = reference_text(PROMPT, 20, ENDLESS), tiny.shared_identity("anchor", 1), tiny.version
    with running(tiny) as url, ProtocolClient(url) as client:
        session = client.open(sampling=ENDLESS, identity=identity)
        session.run_round(draft=[*truth[1:4], (truth[4] + 1) % 300], siblings={3: [truth[4]]})
        session.run_round(draft=truth[len(session.ids) - 4 :][:2], n=3)
        session.run_round(n=2)
        client.expect_error(client.post(session.path, session.next_round(round=9)), 409, ErrorCode.ROUND_OUT_OF_ORDER)
        found = samples(httpx.get(f"{url}/metrics").text)
    assert of(found, "spec_decode_num_drafts_total", version=version) == 2
    assert of(found, "spec_decode_num_draft_tokens_total", version=version) == 6
    assert of(found, "spec_decode_num_accepted_tokens_total", version=version) == 5
    per_position = [
        of(found, "spec_decode_num_accepted_tokens_per_pos_total", version=version, position=str(index))
        for index in range(3)
    ]
    assert per_position == [2, 2, 1]
    assert of(found, "spec_decode_num_sibling_hits_total", version=version) == 1
    assert of(found, "draft_tokens_total", draft=identity) == 6
    assert of(found, "draft_accepted_tokens_total", draft=identity) == 5
    assert of(found, "own_tokens_total", version=version) == len(session.ids) - 4 - 5
    assert of(found, "principal_tokens_total", name="none") == len(session.ids) - 4
    assert of(found, "refusals_total", code=ErrorCode.ROUND_OUT_OF_ORDER) == 1
    assert of(found, "prompt_tokens_total") == 4
    assert of(found, "queue_seconds_count") == of(found, "round_seconds_count") == 4
    assert of(found, "round_overhead_seconds_sum") <= of(found, "round_seconds_sum")
    assert of(found, "forward_seconds_count") >= 4
    assert of(found, "forward_sessions_count") == of(found, "forward_rows_count") == of(found, "forward_seconds_count")
    assert (of(found, "sessions"), of(found, "session_limit"), of(found, "rounds_playing")) == (1, 256, 0)
    assert (of(found, "cache_tokens"), of(found, "draining")) == (len(session.ids), 0)
    assert of(found, "session_evictions_total") == 0


def test_labels_that_clients_choose_are_bounded() -> None:
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
    assert of(found, "draft_tokens_total", draft=OTHER_VALUE) == 2 * MAX_DRAFTS


# The log


def test_a_request_is_found_in_the_log_by_its_name(tiny: Target, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cloud_verifier")
    prompt = [231, 232, 233, 234]
    with running(tiny) as url, ProtocolClient(url) as client:
        client.http.headers["x-request-id"] = "board-7/answer-12"
        session = client.open(prompt)
        response = client.post(session.path, session.next_round())
        assert response.headers["x-request-id"] == "board-7/answer-12"
        client.http.headers["x-request-id"] = "not one; " + "x" * 100
        assert "x-request-id" not in client.post(session.path, session.next_round(round=5)).headers
        del client.http.headers["x-request-id"]
        assert "x-request-id" not in client.post(session.path, session.next_round(round=6)).headers
    lines = [record for record in caplog.records if record.name == "cloud_verifier.api.access_log"]
    fields = [getattr(record, logs.EXTRA_FIELDS) for record in lines]
    assert [record.levelname for record in lines] == ["INFO", "DEBUG", "INFO", "INFO"]
    assert [each["FLEXSPEC_REQUEST_ID"] for each in fields[:2]] == ["board-7/answer-12"] * 2
    assert len({each["FLEXSPEC_REQUEST_ID"] for each in fields}) == 3
    assert [each["FLEXSPEC_CODE"] for each in fields] == ["", "", *["round_out_of_order"] * 2]
    said = " ".join(record.getMessage() + str(getattr(record, logs.EXTRA_FIELDS)) for record in lines)
    assert session.id not in said
    assert not any(str(token) in said for token in prompt)


# Overload


async def test_load_is_shed_before_the_queue_is_long(tiny: Target, reference_text: ReferenceText) -> None:
    target = ObservedTarget(tiny)
    headers = {"content-type": MSGPACK}
    async with (
        serving(target, VerifierLimits(max_queue_seconds=0.6)) as server,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client,
    ):

        async def open_one(seed: int) -> httpx.Response:
            asked = opening([5, seed + 1], Sampling(1.0, seed=seed, ignore_eos=True))
            return await client.post("/v1/sessions", content=messages.encode(asked, MSGPACK))

        async def play_one(session: str) -> httpx.Response:
            body = messages.encode(RoundRequest(PROTOCOL_VERSION, 1, 3), MSGPACK, session)
            return await client.post(f"/v1/sessions/{session}/rounds", content=body)

        opened = [messages.decode((await open_one(seed)).content, messages.OpenReply, MSGPACK) for seed in range(9)]
        target.hold()
        waiting = [asyncio.create_task(play_one(reply.session)) for reply in opened[:8]]
        while server._service.admission.waiting < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # Whatever the machine does meanwhile, from now on the oldest of them has waited for more than half of that.
        await asyncio.sleep(0.4)
        refused = await open_one(99)
        assert (refused.status_code, decode_error(refused).code) == (503, ErrorCode.OVERLOADED)
        assert refused.headers["retry-after"] == "1"
        # Texts that have begun may go on for a while longer; then they, too, are told to come back.
        await asyncio.sleep(0.4)
        refused = await play_one(opened[8].session)
        assert (refused.status_code, decode_error(refused).code) == (503, ErrorCode.OVERLOADED)
        assert (await client.get("/healthz")).status_code == 200
        target.release()
        for seed, answer in enumerate(await asyncio.gather(*waiting)):
            said = (
                opened[seed].first.tokens + messages.decode(answer.content, Frame, MSGPACK, opened[seed].session).tokens
            )
            assert said == reference_text([5, seed + 1], 2, Sampling(1.0, seed=seed, ignore_eos=True))
        assert (await open_one(60)).status_code == (await play_one(opened[8].session)).status_code == 200


async def test_texts_that_begin_wait_for_one_another_and_not_for_their_own_prompt() -> None:
    held = AdmissionController(0.2)

    def enter(prompt: int) -> RoundReply:
        answer = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, 1))
        held.register(answer, prompt)
        return answer

    first = enter(100)
    first.push(Frame(PROTOCOL_VERSION, 0, tokens=[1], prefill_100us=500))
    held.unregister(first, 100)
    # Half a millisecond a token: that long one alone would take a second, and is not waiting.
    answers = [enter(2000), *[enter(10) for _ in range(5)]]
    await asyncio.sleep(0.15)
    held.check(opening=True)
    answers[0].push(Frame(PROTOCOL_VERSION, 0, tokens=[1]))
    with pytest.raises(VerifierRefused, match="try again shortly"):
        held.check(opening=True)
    # Rounds of texts that have begun go beside them.
    held.check(opening=False)
    assert held.waiting == 5
    for answer in answers:
        answer.push(Frame(PROTOCOL_VERSION, 0, tokens=[1]))
    held.check(opening=True)


# The end


@contextlib.asynccontextmanager
async def draining(target: Target) -> AsyncIterator[tuple[VerifierService, VerifierServer]]:
    service = VerifierService(lambda: target, VerifierLimits())
    server = VerifierServer(service, ListenOptions(port=0))
    await server.start()
    try:
        yield service, server
    finally:
        await server.stop()


async def test_a_drain_ends_rounds_and_refuses_new_ones(tiny: Target, reference_text: ReferenceText) -> None:
    truth = reference_text(PROMPT, 402, ENDLESS)
    async with draining(tiny) as (service, server), VerifierClient(server.url) as client:
        session = VerifierSession(client, PROMPT, ENDLESS)
        other = VerifierSession(client, PROMPT, ENDLESS)
        await anext(other.play([]))
        playing = session.play([], n=400, stream=True)
        await anext(playing)
        ending = asyncio.create_task(service.drain(30))
        await asyncio.sleep(0)
        async with httpx.AsyncClient(base_url=server.url) as asking:
            ready = await asking.get("/readyz")
            assert (ready.status_code, decode_error(ready).code) == (503, ErrorCode.DRAINING)
            assert ready.headers["retry-after"] == "1"
            assert (await asking.get("/healthz")).status_code == 200
            assert of(samples((await asking.get("/metrics")).text), "draining") == 1
            # What was answered is answered again.
            repeated = messages.encode(RoundRequest(PROTOCOL_VERSION, 0, 4), MSGPACK, other._id)
            assert (await asking.post(f"/v1/sessions/{other._id}/rounds", content=repeated)).status_code == 200
        client.deadline = 4.0
        with pytest.raises(VerifierRefused, match="shutting down"):
            await anext(other.play([]))
        async for _ in playing:
            pass
        assert await ending
        assert session.ids == PROMPT + truth[:400]


async def test_a_drain_is_bounded(tiny: Target) -> None:
    target = ObservedTarget(tiny)
    async with draining(target) as (service, server), VerifierClient(server.url) as client:
        target.hold()
        playing = asyncio.create_task(anext(VerifierSession(client, PROMPT, ENDLESS).play([])))
        assert await asyncio.to_thread(target.reached.wait, 20)
        assert not await service.drain(0.1)
        assert len(service.admission) == 1
        target.release()
        await playing
        assert await service.drain(20)


async def test_a_board_goes_on_elsewhere_when_its_verifier_is_about_to_end(
    tiny: Target, reference_text: ReferenceText
) -> None:
    async with (
        draining(tiny) as (first, one),
        draining(tiny) as (_, another),
        VerifierClient([one.url, another.url]) as client,
    ):
        session = VerifierSession(client, PROMPT, ENDLESS)
        async for _ in session.play([1, 2], n=5):
            pass
        assert await first.drain(20)
        for _ in range(3):
            async for _ in session.play([1, 2], n=5):
                pass
        assert (session.recoveries, client.retries) == (1, 1)
        assert client.url == another.url
        assert session.ids == PROMPT + reference_text(PROMPT, len(session.ids) - 4, ENDLESS)


async def test_a_board_waits_for_its_only_verifier_to_come_back(tiny: Target, reference_text: ReferenceText) -> None:
    async with draining(tiny) as (service, server), VerifierClient(server.url, deadline=30) as client:
        session = VerifierSession(client, PROMPT, ENDLESS)
        async for _ in session.play([], n=5):
            pass
        await service.drain(5)
        asyncio.get_running_loop().call_later(1.0, setattr, service.admission, "draining", False)
        async for _ in session.play([], n=5):
            pass
        assert session.ids == PROMPT + reference_text(PROMPT, 10, ENDLESS)
        assert 1 <= client.retries <= 5


def test_sigterm_in_mid_round_cuts_nothing_off(tiny_path: Path, reference_text: ReferenceText) -> None:
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(tiny_path), "--port", "0", "--threads", "1"]
    # A machine that has much else to do is no reason to cut it short.
    command += ["--grace", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]

            async def play() -> list[int]:
                async with VerifierClient(url) as client:
                    session = VerifierSession(client, PROMPT, ENDLESS)
                    playing = session.play([], n=450, stream=True)
                    await anext(playing)
                    process.send_signal(signal.SIGTERM)
                    async for _ in playing:
                        pass
                    client.deadline = 0.5
                    # Refused because it is about to end, or not there any more.
                    with pytest.raises(VerifierError):
                        await anext(session.play([]))
                    return session.ids

            assert asyncio.run(play()) == PROMPT + reference_text(PROMPT, 450, ENDLESS)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (0, "", "")


def test_sighup_reads_the_tokens_again_and_the_log_is_json(tiny_path: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"

    def cli(*words: str) -> str:
        command = [sys.executable, "-m", "cloud_verifier.cli", "token", *words, "--tokens", str(tokens)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

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
            until = time.monotonic() + 20
            while status(second) != 200 and time.monotonic() < until:
                time.sleep(0.05)
            assert (status(first), status(second)) == (401, 200)
            tokens.write_text("broken")
            os.kill(process.pid, signal.SIGHUP)
            time.sleep(0.5)
            assert status(second) == 200
            process.terminate()
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    said = [json.loads(line) for line in err.splitlines()]
    assert any("is not TOML" in line["message"] and line["level"] == "error" for line in said)
    refused = next(line for line in said if line.get("flexspec_code") == "unauthorized")
    assert (refused["logger"], refused["flexspec_status"]) == ("cloud_verifier.api.access_log", 401)
    assert first not in err and second not in err
