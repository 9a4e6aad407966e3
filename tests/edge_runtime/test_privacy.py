"""What leaves the board: nothing unencrypted without permission, and no field that the README does not list."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import h11
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.cli.main import main
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.messages import MSGPACK, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.settings import check_encryption, is_in_clear
from tests.cloud_verifier.protocol_client import running

pytestmark = pytest.mark.usefixtures("toy_bundle")

README = Path(__file__).resolve().parents[2] / "edge_runtime" / "README.md"
PROMPT = "def an_unmistakable_prompt(password):\n"
REMOTE = "http://verifier.example"


@pytest.mark.parametrize(
    ("url", "clear"),
    [
        (REMOTE, True),
        ("HTTP://10.0.0.7:8500", True),
        ("http://127.0.0.1.example", True),
        ("http://[2001:db8::1]:8500", True),
        ("http://me@verifier.example", True),
        ("https://verifier.example", False),
        ("http://127.0.0.1:8500", False),
        ("http://[::1]:8500", False),
        ("http://localhost", False),
        ("nonsense", False),
        ("http://[::1", False),
    ],
)
def test_is_in_clear(url: str, clear: bool) -> None:
    assert is_in_clear(url) == clear


@pytest.mark.parametrize("command", [["generate", "x"], ["serve", "--port", "0"]])
def test_unencrypted_prompts_to_another_machine_are_refused(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--policy", "fixed", "--verifier", REMOTE]) == 2
    error = capsys.readouterr().err
    assert f"would be sent to {REMOTE} unencrypted" in error
    assert "--insecure" in error
    assert "https://" in error


def test_a_token_is_never_sent_unencrypted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("secret")
    options = ["--policy", "fixed", "--token-file", str(tmp_path / "token"), "--insecure"]
    assert main(["generate", "x", "--verifier", REMOTE, *options]) == 2
    assert f"the token would be sent to {REMOTE} unencrypted" in capsys.readouterr().err
    # One unencrypted URL among several is enough.
    with pytest.raises(InputError, match="the token would be sent"):
        check_encryption(["https://verifier.example", REMOTE], has_token=True, insecure=True)


def test_encrypted_local_or_permitted_urls_are_accepted() -> None:
    urls = ["https://verifier.example", "http://127.0.0.1:8500"]
    check_encryption(urls, has_token=True, insecure=False)
    check_encryption([REMOTE], has_token=False, insecure=True)


def test_the_configuration_can_permit_unencrypted_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text(f"[verifier]\nurls = ['{REMOTE}']\ninsecure = true\ndeadline_seconds = 0.2\n")
    assert main(["generate", "x", "--policy", "fixed", "--config", str(tmp_path / "config.toml")]) == 4
    assert "unencrypted" not in capsys.readouterr().err


# Recording what is sent


@contextlib.contextmanager
def recording_relay(url: str) -> Iterator[tuple[str, list[bytes]]]:
    """Run a relay in front of the verifier at `url`; yield its URL, and what clients sent on each connection."""
    host, port = url.removeprefix("http://").split(":")
    sent: list[bytes] = []

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            index = len(sent)
            sent.append(b"")
            with socket.create_connection((host, int(port))) as verifier:
                threading.Thread(target=self.relay_replies, args=[verifier], daemon=True).start()
                while data := self.request.recv(65536):
                    sent[index] += data
                    verifier.sendall(data)
                verifier.shutdown(socket.SHUT_WR)

        def relay_replies(self, verifier: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := verifier.recv(65536):
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
        server.shutdown()


def parse_requests(sent: bytes) -> Iterator[tuple[h11.Request, bytes]]:
    """Yield the requests on one connection, with their bodies."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(sent)
    while isinstance(request := connection.next_event(), h11.Request):
        body = b""
        while isinstance(data := connection.next_event(), h11.Data):
            body += bytes(data.data)
        yield request, body
        connection.send(h11.Response(status_code=204, headers=[]))
        connection.send(h11.EndOfMessage())
        if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
            return
        connection.start_next_cycle()


def documented_fields(name: str) -> tuple[str, ...]:
    """Return the fields that the README's table lists for `name`."""
    (row,) = (line for line in README.read_text().splitlines() if line.startswith("|") and f"(`{name}`)" in line)
    return tuple(re.findall(r"`([\w-]+)`", row.split("|")[2]))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [("--num-assistant-tokens", "5", "--siblings", "2"), ("--policy", "analytic")])
def test_requests_hold_only_the_documented_fields(
    target_v1: Target, family: Path, tmp_path: Path, plan: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text("a-token")
    sampled = ("--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "40")
    with running(target_v1) as url, recording_relay(url) as (relay, sent):
        options = (*sampled, *plan, "--no-http2", "--token-file", str(tmp_path / "token"), "--json")
        assert main(["generate", PROMPT, "--verifier", relay, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    opened, rounds = [], []
    for request, body in (parsed for stream in sent for parsed in parse_requests(stream)):
        names = [name.decode() for name, _ in request.headers]
        assert set(names) <= set(documented_fields("headers")), names
        if request.method == b"DELETE":
            assert body == b""
            continue
        kind = RoundRequest if request.target.endswith(b"/rounds") else OpenRequest
        session = request.target.decode().split("/")[3] if kind is RoundRequest else ""
        message = messages.decode(body, kind, MSGPACK, session)
        # There are no bytes besides the fields.
        assert messages.encode(message, MSGPACK, session) == body
        (rounds if kind is RoundRequest else opened).append(message)
    (opening,) = opened
    assert opening.sampling == Sampling(0.7, 50, 0.9, 7)
    # Includes rounds that were sent early and then discarded.
    assert len(rounds) + 1 >= answer["statistics"]["rounds"]
    for kind in (OpenRequest, RoundRequest, Sampling):
        assert kind.__struct_fields__ == documented_fields(kind.__name__)
    # Neither the prompt nor the answer is sent as text.
    everything = b"".join(sent)
    for text in (PROMPT[:12], PROMPT[-12:], *re.findall(r"\w{6,}", answer["text"])):
        assert text.encode() not in everything
