"""What a client without a token may not do to a verifier: slow and endless bodies, foreign names, idle connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.cli.main import main
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.model.target import Target
from edge_runtime.common import connections, request_body
from edge_runtime.common.connections import ConnectionLimits
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import JSON, MSGPACK, ErrorCode, OpenRequest, RoundRequest
from tests.cloud_verifier.protocol_client import ProtocolClient, decode_error, running

IDLE_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04\x00" + bytes(4)


def test_a_slow_body_is_refused(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.2)

    def bytes_of_a_body() -> Iterator[bytes]:
        for _ in range(60):
            yield b"{"
            time.sleep(0.01)

    with running(tiny) as url, httpx.Client(base_url=url, http1=False, http2=True, timeout=60) as client:
        for path in ("/v1/sessions", "/v1/sessions/none/rounds"):
            response = client.post(path, content=bytes_of_a_body())
            assert (response.status_code, decode_error(response).code) == (408, ErrorCode.TOO_SLOW)


def test_a_body_in_chunks_has_the_same_limit(tiny: Target) -> None:
    with running(tiny, VerifierLimits(max_body=10_000)) as url:
        for content in (bytes(10_001), (bytes(1000) for _ in range(11))):
            response = httpx.post(f"{url}/v1/sessions", content=content, timeout=60)
            assert (response.status_code, decode_error(response).code) == (413, ErrorCode.TOO_LARGE)
            assert decode_error(response).detail == {"limit": 10_000}


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_a_local_verifier_without_tokens_answers_only_for_its_own_names(tiny: Target, http2: bool) -> None:
    with (
        running(tiny, allowed_hosts=("Verifier.Example",)) as url,
        httpx.Client(base_url=url, http1=not http2, http2=http2, timeout=60) as client,
    ):
        port = url.rpartition(":")[2]
        for name in ("localhost", f"127.0.0.1:{port}", "[::1]:1", socket.gethostname(), "verifier.example:8500"):
            assert client.get("/healthz", headers={"host": name}).status_code == 200
        for path in ("/v1/models", "/healthz", "/metrics", "/openapi.json", "/nowhere"):
            response = client.get(path, headers={"host": f"evil.example:{port}"})
            assert (response.status_code, decode_error(response).code) == (403, ErrorCode.FORBIDDEN)
            assert "--allowed-hosts" in decode_error(response).message


def test_with_tokens_or_on_the_network_any_name_is_right(tiny: Target, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.touch()
    for options in ({"authenticator": Authenticator(file)}, {"host": "0.0.0.0"}):
        with running(tiny, **options) as url:
            address = url.replace("0.0.0.0", "127.0.0.1")
            assert httpx.get(f"{address}/healthz", headers={"host": "board.example"}).status_code == 200


def test_a_token_file_without_tokens_admits_nobody(tiny: Target, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.touch()
    with running(tiny, authenticator=Authenticator(file)) as url:
        response = httpx.get(f"{url}/v1/models")
        assert (response.status_code, decode_error(response).code) == (401, ErrorCode.UNAUTHORIZED)


def test_idle_connections_do_not_keep_a_board_out(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BUSY_SECONDS", 0.02)
    limits = ConnectionLimits(total=20, per_address=16, shared=("127.0.0.1/32",))
    with running(tiny, connections=limits) as url:
        port = int(url.rpartition(":")[2])
        sockets = []
        try:
            for number in range(60):
                sockets.append(socket.create_connection(("127.0.0.1", port), 60, ("127.0.0.66", 0)))
                sockets[-1].sendall(IDLE_HTTP2)
                if number % 20 == 0:
                    with ProtocolClient(url) as client:
                        session = client.open(n=3)
                        session.run_round(draft=[1, 2, 3])
        finally:
            for each in sockets:
                each.close()


def test_large_bodies_do_not_hold_the_event_loop(tiny: Target) -> None:
    """The watchdog of the suite measures; see `tests/event_loop_watchdog.py`."""
    first = RoundRequest(v=1, round=0, position=250_000)
    large = OpenRequest(v=1, key="key-large", prompt=[7] * 250_000, first=first)
    with running(tiny) as url, httpx.Client(base_url=url, timeout=60) as client:
        for media_type in (JSON, MSGPACK):
            headers = {"content-type": media_type}
            response = client.post("/v1/sessions", content=messages.encode(large, media_type), headers=headers)
            assert (response.status_code, decode_error(response).code) == (413, ErrorCode.CONTEXT_OVERFLOW)
            draft = messages.encode(RoundRequest(v=1, round=1, position=4, draft=[7] * 250_000), media_type, "none")
            response = client.post("/v1/sessions/none/rounds", content=draft, headers=headers)
            assert response.status_code in (400, 404, 413)
        for path in ("/openapi.json", "/metrics", "/v1/models", "/healthz"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-connections", "0"),
        ("--max-connections-per-address", "-1"),
        ("--allowed-hosts", "a/b"),
        ("--max-body", "0"),
    ],
)
def test_senseless_bounds_are_refused(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(tiny_path), option, value])
    assert f"argument {option}" in capsys.readouterr().err
