"""What leaves the board: nothing in clear that nobody allowed, and nothing that the README does not name."""

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
from edge_runtime.cli import main, verifier_options
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.messages import MSGPACK, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.settings.validators import is_in_clear
from tests.cloud_verifier.protocol_client import running

README = Path(__file__).resolve().parents[2] / "edge_runtime" / "README.md"
PROMPT = "def a_secret_that_nobody_should_read(password):\n"
FAR = "http://verifier.example"


@pytest.mark.parametrize(
    ("url", "clear"),
    [
        (FAR, True),
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
def test_what_is_in_clear(url: str, clear: bool) -> None:
    assert is_in_clear(url) == clear


@pytest.mark.parametrize("command", [["generate", "x"], ["serve", "--port", "0"]])
def test_prompts_go_to_other_machines_in_clear_only_where_that_is_allowed(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*command, "--policy", "fixed", "--verifier", FAR]) == 2
    error = capsys.readouterr().err
    assert f"would go to {FAR} unencrypted" in error
    assert "--insecure" in error
    assert "https://" in error


def test_a_token_never_travels_in_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("secret")
    options = ["--policy", "fixed", "--token-file", str(tmp_path / "token"), "--insecure"]
    assert main.main(["generate", "x", "--verifier", FAR, *options]) == 2
    assert f"the token would go to {FAR} unencrypted" in capsys.readouterr().err
    # One such URL among several is one too many.
    with pytest.raises(InputError, match="the token would go"):
        verifier_options.check_private(["https://verifier.example", FAR], token=True, insecure=True)


def test_what_is_private_or_allowed_is_not_refused(tmp_path: Path) -> None:
    verifier_options.check_private(["https://verifier.example", "http://127.0.0.1:8500"], token=True, insecure=False)
    verifier_options.check_private([FAR], token=False, insecure=True)


def test_the_configuration_may_allow_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text(f"[verifier]\nurls = ['{FAR}']\ninsecure = true\ndeadline_seconds = 0.2\n")
    assert main.main(["generate", "x", "--policy", "fixed", "--config", str(tmp_path / "config.toml")]) == 4
    assert "unencrypted" not in capsys.readouterr().err


# What is sent


@contextlib.contextmanager
def recording(url: str) -> Iterator[tuple[str, list[bytes]]]:
    """A relay before the verifier at `url`: its URL, and what clients sent over each connection."""
    host, port = url.removeprefix("http://").split(":")
    sent: list[bytes] = []

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            index = len(sent)
            sent.append(b"")
            with socket.create_connection((host, int(port))) as verifier:
                threading.Thread(target=self.back, args=[verifier], daemon=True).start()
                while piece := self.request.recv(65536):
                    sent[index] += piece
                    verifier.sendall(piece)
                verifier.shutdown(socket.SHUT_WR)

        def back(self, verifier: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while piece := verifier.recv(65536):
                    self.request.sendall(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
        server.shutdown()


def requests(sent: bytes) -> Iterator[tuple[h11.Request, bytes]]:
    """The requests on one connection."""
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


def documented(name: str) -> tuple[str, ...]:
    """The fields that the README's table names for `name`."""
    (row,) = (line for line in README.read_text().splitlines() if line.startswith("|") and f"(`{name}`)" in line)
    return tuple(re.findall(r"`([\w-]+)`", row.split("|")[2]))


@pytest.mark.parametrize("plan", [("--num-assistant-tokens", "5", "--siblings", "2"), ("--policy", "analytic")])
def test_what_is_sent_is_what_the_readme_says(
    target_v1: Target, family: Path, tmp_path: Path, plan: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text("a-token")
    sampled = ("--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "40")
    with running(target_v1) as url, recording(url) as (relay, sent):
        options = (*sampled, *plan, "--no-http2", "--token-file", str(tmp_path / "token"), "--json")
        assert main.main(["generate", PROMPT, "--verifier", relay, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    opened, rounds = [], []
    for request, body in (found for stream in sent for found in requests(stream)):
        names = [name.decode() for name, _ in request.headers]
        assert set(names) <= set(documented("headers")), names
        if request.method == b"DELETE":
            assert body == b""
            continue
        kind = RoundRequest if request.target.endswith(b"/rounds") else OpenRequest
        session = request.target.decode().split("/")[3] if kind is RoundRequest else ""
        message = messages.decode(body, kind, MSGPACK, session)
        # Nothing lies between or behind the fields.
        assert messages.encode(message, MSGPACK, session) == body
        (rounds if kind is RoundRequest else opened).append(message)
    (opening,) = opened
    assert opening.sampling == Sampling(0.7, 50, 0.9, 7)
    # Rounds that were sent early and came to nothing are among them.
    assert len(rounds) + 1 >= answer["statistics"]["rounds"]
    for kind in (OpenRequest, RoundRequest, Sampling):
        assert kind.__struct_fields__ == documented(kind.__name__)
    # No text, neither of the prompt nor of the answer.
    everything = b"".join(sent)
    for text in (PROMPT[:12], PROMPT[-12:], *re.findall(r"\w{6,}", answer["text"])):
        assert text.encode() not in everything
