"""Several replicas at one address: routing by session, and the death of a replica."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_verifier.cli.main import main
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import JSON, MSGPACK, ErrorCode, Frame, OpenReply
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.session import VerifierSession
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, TIMEOUT_SECONDS, opening

VERIFIER = [sys.executable, "-m", "cloud_verifier.cli"]
BOARDS, ANSWER_TOKENS = 16, 120

# Ray itself raises these when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize("media_type", [MSGPACK, JSON])
def test_all_requests_of_a_session_have_one_mark(media_type: str) -> None:
    # Inside the test, since importing Ray takes seconds and this module is always collected.
    from cloud_verifier.replicas.ingress import session_mark

    open_request = opening()
    mark = session_mark("POST", "/v1/sessions", media_type, messages.encode(open_request, media_type))
    session = messages.session_id_prefix(open_request.key) + "-rest_of"
    assert mark == messages.session_id_prefix(open_request.key) != ""
    assert session_mark("POST", f"/v1/sessions/{session}/rounds", media_type, b"") == mark
    assert session_mark("DELETE", f"/v1/sessions/{session}", media_type, b"") == mark


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\x93\x01\x02\x03....", b"\xc1", b'{"key": 7}', b"\x91" * 5000])
def test_other_requests_have_no_mark(body: bytes) -> None:
    from cloud_verifier.replicas.ingress import session_mark

    for media_type in (MSGPACK, JSON):
        assert session_mark("POST", "/v1/sessions", media_type, body) == ""
    assert session_mark("GET", "/v1/models", JSON, body) == ""
    assert session_mark("POST", "/v1/sessions/", JSON, body) == ""


def test_metrics_of_replicas_are_merged() -> None:
    from cloud_verifier.replicas.ingress import merge_metrics

    page = b'# HELP a_total Of a.\n# TYPE a_total counter\na_total{of="x"} %d\n# HELP g Of g.\n# TYPE g gauge\ng 3.0\n'
    merged = merge_metrics({"one": page % 1, "two": page % 2}, running=2).decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
    }
    assert samples == {
        ("a_total", "one", "x"): 1,
        ("a_total", "two", "x"): 2,
        ("g", "one"): 3,
        ("g", "two"): 3,
        ("flexspec_replicas",): 2,
    }
    assert merged.count("# TYPE a_total counter") == 1


@pytest.mark.parametrize("replicas", ["0", "3-2", "-1", "two"])
def test_an_invalid_number_of_replicas(replicas: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "target", f"--replicas={replicas}"])
    assert "neither a number of replicas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--device", "cuda:1"], "Ray chooses"),
        (["--ray", "127.0.0.1:9"], "no Ray cluster at 127.0.0.1:9"),
        (["--ray", "nonsense"], "HOST:PORT of its head node"),
    ],
)
def test_impossible_options_of_replicas(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "target", "--replicas", "2", *options]) == 2
    assert word in capsys.readouterr().err


def replica_pids(process: subprocess.Popen[str]) -> set[int]:
    """Process ids of the replicas."""
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def add_admin_token(name: str, tokens: Path) -> str:
    return subprocess.check_output(
        [*VERIFIER, "token", "add", name, "--role", "admin", "--tokens", str(tokens)], text=True
    ).strip()


@pytest.fixture
def two_replicas(tiny_path: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path, str]]:
    """`cloud-verifier serve --replicas 2`: process, URL, token file and an admin's token. Killed if it still runs."""
    tokens = tmp_path / "tokens.toml"
    token = add_admin_token("all", tokens)
    options = ["--port", "0", "--threads", "1", "--replicas", "2", "--tokens", str(tokens)]
    process = subprocess.Popen([*VERIFIER, "serve", str(tiny_path), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().rsplit(" ", 1)[-1].strip(), tokens, token
    finally:
        with contextlib.suppress(psutil.Error):
            processes = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in processes:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        process.wait()


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not await condition():  # noqa: ASYNC110 - the condition becomes true in another process
            await asyncio.sleep(0.3)


def streamed_tokens(body: str) -> list[int]:
    """The tokens of a streamed opening in JSON."""
    first, *others = body.splitlines()
    frames = [messages.decode(first.encode(), OpenReply, JSON).first]
    frames += [messages.decode(line.encode(), Frame, JSON) for line in others]
    assert not frames[-1].more
    return [token for frame in frames for token in frame.tokens]


async def read_metric(http: httpx.AsyncClient, name: str) -> list[float]:
    """The values of a metric, one per replica; empty if the verifier cannot report its metrics."""
    response = await http.get("/metrics")
    families = text_string_to_metric_families(response.text if response.is_success else "")
    return [sample.value for family in families for sample in family.samples if sample.name == f"flexspec_{name}"]


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS)
async def test_killing_a_replica_during_answers_costs_no_token(
    two_replicas: tuple[subprocess.Popen[str], str, Path, str], reference_text: ReferenceText
) -> None:
    process, url, tokens, token = two_replicas
    samplings = [Sampling(0.9 * (seed % 2), seed=seed, ignore_eos=True) for seed in range(BOARDS)]
    truths = [reference_text(PROMPT, ANSWER_TOKENS, sampling) for sampling in samplings]
    received_tokens = 0
    one_third_done = asyncio.Event()

    async def answer(client: VerifierClient, index: int) -> VerifierSession:
        """Generate the whole answer of a board, in rounds of all kinds; the drafts begin with right tokens."""
        nonlocal received_tokens
        session = VerifierSession(client, PROMPT, samplings[index])
        while (left := ANSWER_TOKENS - (len(session.ids) - len(PROMPT))) > 0:
            ahead = truths[index][-left:][:4]
            draft = [*ahead[:2], *((token + 1) % 300 for token in ahead[2:])] if left > 8 else []
            n = min(left, 1 + index % 3 * 12) if not draft else 1 + index % 2 * 7
            async for update in session.run_round(draft, n=min(n, max(1, left - 3)), stream=bool(index % 4)):
                received_tokens += len(update.accepted) + len(update.own)
                if received_tokens > BOARDS * ANSWER_TOKENS / 3:
                    one_third_done.set()
        return session

    async with (
        httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=TIMEOUT_SECONDS) as http,
        VerifierClient(url, deadline=TIMEOUT_SECONDS, token=token) as client,
    ):

        async def both_running() -> bool:
            return victim not in replica_pids(process) and len(await read_metric(http, "sessions")) == 2

        victim = 0
        await wait_until(both_running)
        with pytest.raises(VerifierRefused) as caught:
            async with VerifierClient(url) as anonymous:
                await anext(VerifierSession(anonymous, PROMPT, Sampling()).run_round([]))
        assert caught.value.code == ErrorCode.UNAUTHORIZED
        both = replica_pids(process)
        assert len(both) == 2

        # A client that lost its connection repeats the opening and gets the same session and the whole answer.
        open_request = messages.encode(opening(sampling=samplings[1], n=ANSWER_TOKENS, stream=True), JSON)
        for _ in range(2):
            async with http.stream("POST", "/v1/sessions", content=open_request, headers={"content-type": JSON}) as cut:
                await anext(cut.aiter_bytes())
        again = await http.post("/v1/sessions", content=open_request, headers={"content-type": JSON})
        assert streamed_tokens(again.text) == truths[1]
        assert sum(await read_metric(http, "sessions")) == 1

        answers = [asyncio.create_task(answer(client, index)) for index in range(BOARDS)]
        await one_third_done.wait()
        assert min(await read_metric(http, "sessions")) > 0
        victim = min(both)
        assert sum(not task.done() for task in answers) > BOARDS / 2
        os.kill(victim, signal.SIGKILL)
        sessions = await asyncio.gather(*answers)

        for session, truth in zip(sessions, truths, strict=True):
            assert session.ids == PROMPT + truth
        lost = sum(session.recoveries > 0 for session in sessions)
        assert lost > 0, "no session was on the killed replica"
        assert (await http.get("/readyz")).status_code == 200

        # Ray replaces the replica.
        await wait_until(both_running)
        assert len(replica_pids(process) - both) == 1
        assert (await answer(client, 0)).ids == PROMPT + truths[0]

        # After SIGHUP all replicas know a new token.
        late = await asyncio.to_thread(add_admin_token, "late", tokens)
        headers = {"authorization": f"Bearer {late}"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 401
        process.send_signal(signal.SIGHUP)

        async def known_by_all() -> bool:
            return [(await http.get("/v1/models", headers=headers)).status_code for _ in range(8)] == [200] * 8

        await wait_until(known_by_all)

        # SIGTERM waits for answers in progress.
        processes = psutil.Process(process.pid).children(recursive=True)
        last = messages.encode(opening(sampling=samplings[2], n=ANSWER_TOKENS, stream=True), JSON)
        async with http.stream("POST", "/v1/sessions", content=last, headers={"content-type": JSON}) as answered:
            pieces = answered.aiter_text()
            text = await anext(pieces)
            process.send_signal(signal.SIGTERM)
            async for piece in pieces:
                text += piece
        assert streamed_tokens(text) == truths[2]
        assert await asyncio.to_thread(process.wait, TIMEOUT_SECONDS) == 0
        _, left = await asyncio.to_thread(psutil.wait_procs, processes, TIMEOUT_SECONDS)
        assert not left, [child.cmdline() for child in left]
