"""The server: HTTP versions, TLS, ports in use, malformed requests, and the commands `serve` and `generate`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import torch

from cloud_verifier.api.app import VerifierLimits, VerifierService
from cloud_verifier.api.server import VerifierServer, serve
from cloud_verifier.cli.main import main
from cloud_verifier.engine import scheduler as scheduler_module
from cloud_verifier.model.target import Target
from edge_runtime.common.http_server import ListenOptions
from edge_runtime.protocol.errors import FlexSpecError, TargetError
from edge_runtime.protocol.messages import ErrorCode
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.engine.recording_target import RecordingTarget
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ProtocolClient,
    decode_error,
    opening,
    running,
)
from tests.conftest import serving


def http_version(url: str, **options: object) -> str:
    """Run a session over one connection; returns the HTTP version used."""
    with ProtocolClient(url, **options) as client:
        session = client.open(n=3)
        session.run_round(draft=[1, 2, 3])
        response = client.http.delete(f"/v1/sessions/{session.id}")
        assert response.status_code == 204
        return response.http_version


def test_http1_and_http2_with_prior_knowledge(url: str) -> None:
    assert http_version(url) == "HTTP/1.1"
    assert http_version(url, http1=False, http2=True) == "HTTP/2"


@pytest.mark.parametrize(("only", "http2"), [("1", False), ("2", True)])
def test_one_http_version_only(tiny: Target, only: str, http2: bool) -> None:
    with running(tiny, http=only) as url:
        assert http_version(url, http1=not http2, http2=http2) == f"HTTP/{'2' if http2 else '1.1'}"
        with pytest.raises(httpx.TransportError):
            http_version(url, http1=http2, http2=not http2)


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=verifier -addext subjectAltName=IP:127.0.0.1 "
        f"-out {paths[0]} -keyout {paths[1]}"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return paths


def test_tls_negotiates_http2(tiny: Target, self_signed: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=self_signed[0])
    with running(tiny, certificate=self_signed[0], key=self_signed[1]) as url:
        assert url.startswith("https://")
        assert http_version(url, verify=trust, http2=True) == "HTTP/2"
        assert http_version(url, verify=trust) == "HTTP/1.1"
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            http_version(url)


@pytest.mark.parametrize("contents", [None, "no certificate"], ids=["missing", "malformed"])
async def test_an_unusable_certificate_is_a_typed_error(tiny: Target, tmp_path: Path, contents: str | None) -> None:
    pem = tmp_path / "cert.pem"
    if contents:
        pem.write_text(contents)
    with pytest.raises(FlexSpecError, match=r"cert\.pem"):
        await VerifierServer(
            VerifierService(lambda: tiny, VerifierLimits()), ListenOptions(port=0, certificate=pem, key=pem)
        ).start()


@contextlib.contextmanager
def port_in_use(listening: bool) -> Iterator[int]:
    """A port that another socket has bound, and listens on if `listening`."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("listening", [True, False])
async def test_a_port_in_use_is_reported(tiny: Target, listening: bool) -> None:
    with port_in_use(listening) as port, pytest.raises(FlexSpecError, match=f"port {port}: is the port in use"):
        await VerifierServer(VerifierService(lambda: tiny, VerifierLimits()), ListenOptions(port=port)).start()


async def test_a_verifier_whose_device_is_lost_ends_with_an_error(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "device_responds", lambda device: False)
    target = RecordingTarget(tiny)
    announced: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    service = VerifierService(lambda: target, VerifierLimits())
    serving_task = asyncio.create_task(serve(service, ListenOptions(port=0), announced.set_result))
    url = await announced
    target.fails = lambda piece: True

    def open_session() -> None:
        with ProtocolClient(url) as client:
            client.expect_error(client.post("/v1/sessions", opening()), 500, ErrorCode.INTERNAL)

    await asyncio.to_thread(open_session)
    with pytest.raises(TargetError, match="cpu is lost: injected failure"):
        await serving_task


async def test_a_stopped_server_frees_its_port(tiny: Target) -> None:
    async with serving(tiny) as server:
        port = int(server.url.rsplit(":", 1)[1])
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{server.url}/healthz")
    async with serving(tiny, port=port) as again, httpx.AsyncClient() as client:
        assert again.url == server.url
        assert (await client.get(f"{again.url}/healthz")).status_code == 200


async def test_a_target_that_does_not_load_is_reported() -> None:
    def load() -> Target:
        raise TargetError("no such checkpoint")

    server = VerifierServer(VerifierService(load, VerifierLimits()), ListenOptions(port=0))
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.get("/healthz")).status_code == 200
            response = await client.get("/readyz")
            error = decode_error(response)
            assert (response.status_code, error.code) == (500, ErrorCode.INTERNAL)
            assert "no such checkpoint" in error.message
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff" * 500,
        b"GET\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nshort",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)),
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\naccept: \xff\xfe\r\n\r\n",
    ],
    ids=["noise", "incomplete request", "negative length", "bad chunk", "cut short", "bad http2", "bad header"],
)
def test_malformed_http_does_not_harm_the_server(url: str, garbage: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as connection,
    ):
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(4096):
            assert b" 500 " not in piece
    assert http_version(url) == "HTTP/1.1"


def test_serve_reports_a_directory_without_a_target(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("cloud-verifier: no target at ")
    assert "give the directory of a Hugging Face checkpoint" in err
    assert "Traceback" not in err


def test_a_certificate_without_its_key_is_refused(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_path), "--certificate", "cert.pem"]) == 2
    assert "--certificate and --key must be given together" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["serve", "x", "--port", "http"], ["serve", "x", "--http", "3"]])
def test_usage_errors_exit_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: cloud-verifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve"], "give a TARGET to serve, or --registry DIR"),
        (["serve", "x", "--exact"], "need --device cuda"),
        (["serve", "x", "--compile"], "need --device cuda"),
    ],
    ids=["no target", "exact", "compile"],
)
def test_conflicting_options_are_reported(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "x", "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_generate_runs_jobs(
    tiny_path: Path, tmp_path: Path, reference_text: ReferenceText, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"temperature": 0.8, "seed": 6, "ignore_eos": True, "logit_bias": {7: 2.0}}
    jobs = tmp_path / "jobs"
    lines = [{"ids": PROMPT, "max_new_tokens": 9}, {"ids": [5], "max_new_tokens": 4, "sampling": sampling}]
    jobs.write_bytes(b"\n".join(map(msgspec.json.encode, lines)))
    assert main(["generate", str(tiny_path), "--jobs", str(jobs)]) == 0
    answers = [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [reference_text(PROMPT, 9), reference_text([5], 4, Sampling(**sampling))]


@pytest.mark.parametrize(
    "job",
    [
        "nonsense",
        "[]",
        "{}",
        '{"ids": [1], "max_new_tokens": "many"}',
        '{"ids": [], "max_new_tokens": 1}',
        '{"ids": [300], "max_new_tokens": 1}',
        '{"ids": [1.5], "max_new_tokens": 1}',
        '{"ids": [1], "max_new_tokens": -2}',
        '{"ids": [1], "max_new_tokens": 1, "sampling": {"stop_ids": [300]}}',
        b"\xff",
        '{"ids": [1], "max_new_tokens": 1, "sampling": {"temperature": -1}}',
    ],
)
def test_an_invalid_job_is_reported(
    tiny_path: Path, tmp_path: Path, job: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").write_bytes(job if isinstance(job, bytes) else job.encode())
    assert main(["generate", str(tiny_path), "--jobs", str(tmp_path / "jobs")]) == 2
    assert capsys.readouterr().err.startswith("cloud-verifier: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [""],
        ["x", "--temperature", "-1"],
        ["--jobs", "/nowhere/jobs"],
        [os.fsdecode(b"\xff\xfe")],
        ["x", "--logit-bias", "5000=1"],
        ["a text", "--max-context", "2"],
    ],
)
def test_generate_reports_invalid_arguments(
    tiny_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith("cloud-verifier: ")
