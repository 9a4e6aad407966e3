"""Several replicas behind one door: what keeps a session with its replica, and what a replica's death costs."""

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
from tests.cloud_verifier.protocol_client import PROMPT, opening

VERIFIER = [sys.executable, "-m", "cloud_verifier.cli"]
BOARDS, LONG = 16, 120
# The machine may be busy with the other tests.
PATIENCE = 60

# Ray's own, of its import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("media_type", [MSGPACK, JSON])
def test_all_requests_of_a_session_have_one_mark(media_type: str) -> None:
    # Ray takes seconds to import: not for everybody who only collects this module.
    from cloud_verifier.replicas.ingress import session_mark

    asked = opening()
    mark = session_mark("POST", "/v1/sessions", media_type, messages.encode(asked, media_type))
    session = messages.session_id_prefix(asked.key) + "-rest_of"
    assert mark == messages.session_id_prefix(asked.key) != ""
    assert session_mark("POST", f"/v1/sessions/{session}/rounds", media_type, b"") == mark
    assert session_mark("DELETE", f"/v1/sessions/{session}", media_type, b"") == mark


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\x93\x01\x02\x03....", b"\xc1", b'{"key": 7}', b"\x91" * 5000])
def test_whatever_is_no_session_goes_anywhere(body: bytes) -> None:
    from cloud_verifier.replicas.ingress import session_mark

    for media_type in (MSGPACK, JSON):
        assert session_mark("POST", "/v1/sessions", media_type, body) == ""
    assert session_mark("GET", "/v1/models", JSON, body) == ""
    assert session_mark("POST", "/v1/sessions/", JSON, body) == ""


def test_pages_of_several_replicas_are_one() -> None:
    from cloud_verifier.replicas.ingress import merge_metrics

    page = b'# HELP a_total Of a.\n# TYPE a_total counter\na_total{of="x"} %d\n# HELP g Of g.\n# TYPE g gauge\ng 3.0\n'
    told = merge_metrics({"one": page % 1, "two": page % 2}, running=2).decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
    }
    assert samples == {
        ("a_total", "one", "x"): 1,
        ("a_total", "two", "x"): 2,
        ("g", "one"): 3,
        ("g", "two"): 3,
        ("flexspec_replicas",): 2,
    }
    assert told.count("# TYPE a_total counter") == 1


@pytest.mark.parametrize("replicas", ["0", "3-2", "-1", "two"])
def test_no_number_of_replicas(replicas: str, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_replicas_that_cannot_be(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "target", "--replicas", "2", *options]) == 2
    assert word in capsys.readouterr().err


def replicas_below(process: subprocess.Popen[str]) -> set[int]:
    """Ids of the processes of replicas."""
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def new_token(name: str, tokens: Path) -> str:
    """An admin's."""
    return subprocess.check_output(
        [*VERIFIER, "token", "add", name, "--role", "admin", "--tokens", str(tokens)], text=True
    ).strip()


@pytest.fixture
def two_replicas(tiny_path: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path, str]]:
    """`cloud-verifier serve --replicas 2`, its URL, its tokens and an admin's; ended by force if it is still there."""
    tokens = tmp_path / "tokens.toml"
    token = new_token("all", tokens)
    options = ["--port", "0", "--threads", "1", "--replicas", "2", "--tokens", str(tokens)]
    process = subprocess.Popen([*VERIFIER, "serve", str(tiny_path), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().rsplit(" ", 1)[-1].strip(), tokens, token
    finally:
        with contextlib.suppress(psutil.Error):
            everyone = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in everyone:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        process.wait()


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    """Returns when it is, within PATIENCE."""
    async with asyncio.timeout(PATIENCE):
        while not await true():  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.3)


def tokens_in(answer: str) -> list[int]:
    """Of a streamed opening, in JSON."""
    first, *others = answer.splitlines()
    frames = [messages.decode(first.encode(), OpenReply, JSON).first]
    frames += [messages.decode(line.encode(), Frame, JSON) for line in others]
    assert not frames[-1].more
    return [token for frame in frames for token in frame.tokens]


async def figure(http: httpx.AsyncClient, name: str) -> list[float]:
    """What the verifier's metrics say of it, of every replica; nothing where it cannot say."""
    response = await http.get("/metrics")
    families = text_string_to_metric_families(response.text if response.is_success else "")
    return [sample.value for family in families for sample in family.samples if sample.name == f"flexspec_{name}"]


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
async def test_a_replica_killed_in_mid_answer_costs_no_token(
    two_replicas: tuple[subprocess.Popen[str], str, Path, str], reference_text: ReferenceText
) -> None:
    process, url, tokens, token = two_replicas
    samplings = [Sampling(0.9 * (seed % 2), seed=seed, ignore_eos=True) for seed in range(BOARDS)]
    truths = [reference_text(PROMPT, LONG, sampling) for sampling in samplings]
    told = 0
    third = asyncio.Event()

    async def answer(client: VerifierClient, index: int) -> VerifierSession:
        """A board's whole answer: rounds of all kinds, drafts that are right at first."""
        nonlocal told
        session = VerifierSession(client, PROMPT, samplings[index])
        while (left := LONG - (len(session.ids) - len(PROMPT))) > 0:
            ahead = truths[index][-left:][:4]
            draft = [*ahead[:2], *((token + 1) % 300 for token in ahead[2:])] if left > 8 else []
            n = min(left, 1 + index % 3 * 12) if not draft else 1 + index % 2 * 7
            async for said in session.play(draft, n=min(n, max(1, left - 3)), stream=bool(index % 4)):
                told += len(said.accepted) + len(said.own)
                if told > BOARDS * LONG / 3:
                    third.set()
        return session

    async with (
        httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=30) as http,
        VerifierClient(url, deadline=PATIENCE, token=token) as client,
    ):

        async def both_up() -> bool:
            return victim not in replicas_below(process) and len(await figure(http, "sessions")) == 2

        victim = 0
        await until(both_up)
        with pytest.raises(VerifierRefused) as refused:
            async with VerifierClient(url) as stranger:
                await anext(VerifierSession(stranger, PROMPT, Sampling()).play([]))
        assert refused.value.code == ErrorCode.UNAUTHORIZED
        both = replicas_below(process)
        assert len(both) == 2

        # Who is cut off in mid-answer finds all of it, and a repeated opening its session.
        asked = messages.encode(opening(sampling=samplings[1], n=LONG, stream=True), JSON)
        for _ in range(2):
            async with http.stream("POST", "/v1/sessions", content=asked, headers={"content-type": JSON}) as cut:
                await anext(cut.aiter_bytes())
        again = await http.post("/v1/sessions", content=asked, headers={"content-type": JSON})
        assert tokens_in(again.text) == truths[1]
        assert sum(await figure(http, "sessions")) == 1

        answers = [asyncio.create_task(answer(client, index)) for index in range(BOARDS)]
        await third.wait()
        assert min(await figure(http, "sessions")) > 0
        victim = min(both)
        assert sum(not task.done() for task in answers) > BOARDS / 2
        os.kill(victim, signal.SIGKILL)
        sessions = await asyncio.gather(*answers)

        for session, truth in zip(sessions, truths, strict=True):
            assert session.ids == PROMPT + truth
        lost = sum(session.recoveries > 0 for session in sessions)
        assert lost > 0, "nobody was at the one that was killed"
        assert (await http.get("/readyz")).status_code == 200

        # Ray puts another in its place.
        await until(both_up)
        assert len(replicas_below(process) - both) == 1
        assert (await answer(client, 0)).ids == PROMPT + truths[0]

        # A new token is known everywhere after SIGHUP.
        late = await asyncio.to_thread(new_token, "late", tokens)
        headers = {"authorization": f"Bearer {late}"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 401
        process.send_signal(signal.SIGHUP)

        async def known() -> bool:
            return [(await http.get("/v1/models", headers=headers)).status_code for _ in range(8)] == [200] * 8

        await until(known)

        # The end waits for answers in progress.
        everyone = psutil.Process(process.pid).children(recursive=True)
        last = messages.encode(opening(sampling=samplings[2], n=LONG, stream=True), JSON)
        async with http.stream("POST", "/v1/sessions", content=last, headers={"content-type": JSON}) as answered:
            pieces = answered.aiter_text()
            text = await anext(pieces)
            process.send_signal(signal.SIGTERM)
            async for piece in pieces:
                text += piece
        assert tokens_in(text) == truths[2]
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        _, left = await asyncio.to_thread(psutil.wait_procs, everyone, 20)
        assert not left, [child.cmdline() for child in left]
