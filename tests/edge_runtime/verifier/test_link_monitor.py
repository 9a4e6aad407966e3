"""What is known of a verifier that nobody asks: reachable or not, why not, and what the log says."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_verifier.cli.main import main as cloud_verifier
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.model.target import Target
from edge_runtime.verifier import link_monitor
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import ERRNOS, HINTS, Fault
from edge_runtime.verifier.link_monitor import LinkMonitor
from tests.conftest import serving


@pytest.fixture
def port() -> Iterator[int]:
    """A port of loopback on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
    yield number


def test_every_fault_has_a_hint_and_an_errno() -> None:
    assert set(HINTS) == set(ERRNOS) == set(Fault)
    assert all(number in errno.errorcode for number in ERRNOS.values())


@pytest.mark.slow
async def test_a_verifier_that_is_not_there_is_reported_and_found_again(
    tiny: Target, port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="edge_runtime.verifier.link_monitor")
    monkeypatch.setattr(link_monitor, "FIRST_CHECK_SECONDS", 0.0)
    async with VerifierClient(f"http://127.0.0.1:{port}") as client:
        monitor = LinkMonitor(client)
        assert client.link_state.reachable is None and client.link_state.reason == ""
        for _ in range(3):
            await monitor.step()
        state = client.link_state
        assert state.reachable is False and state.problem is not None
        assert (state.problem.code, state.problem.errno) == ("connection_refused", errno.ECONNREFUSED)
        assert f"http://127.0.0.1:{port}: " in state.reason and HINTS[Fault.REFUSED] in state.reason
        # Once, although it was checked three times: the next line is due in a minute.
        assert caplog.messages == [state.reason]
        async with serving(tiny, port=port):
            await monitor.step()
            assert client.link_state.reachable and client.link_state.reason == ""
        assert [message[:26] for message in caplog.messages[1:]] == ["the verifier answers again"]


async def test_a_lasting_fault_is_logged_again_at_growing_intervals(
    port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(link_monitor.time, "monotonic", lambda: now[0])
    lines = []
    async with VerifierClient(f"http://127.0.0.1:{port}") as client:
        monitor = LinkMonitor(client)
        for _ in range(800):
            await monitor.step()
            lines.append(len(caplog.messages))
            now[0] += 10.0
    logged = [10 * index for index, count in enumerate(lines) if count > ([0, *lines])[index]]
    assert logged == [0, 60, 180, 420, 900, 1860, 3780, 7380]
    assert client.link_state.problem is not None


async def test_a_verifier_that_refuses_this_board_is_no_verifier_for_it(
    tiny: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens.toml"
    assert cloud_verifier(["token", "add", "board", "--tokens", str(tokens)]) == 0
    token = capsys.readouterr().out.strip()
    async with (
        serving(tiny, authenticator=Authenticator(tokens)) as server,
        VerifierClient(server.url, token="wrong") as client,
    ):
        await client.check()
        problem = client.link_state.problem
        assert problem is not None and (problem.code, problem.errno) == ("unauthorized", errno.EACCES)
        assert problem.reason.startswith(f"{server.url} refuses this board: ")
        client.set_token(token)
        await client.check()
        assert client.link_state.reachable


async def test_one_of_several_verifiers_is_enough(tiny: Target, port: int) -> None:
    async with serving(tiny) as server, VerifierClient([f"http://127.0.0.1:{port}", server.url]) as client:
        await client.check()
        assert client.link_state.reachable
    async with VerifierClient([f"http://127.0.0.1:{port}", server.url]) as client:
        await client.check()
        assert client.link_state.problem is not None
        assert f":{port}: " in client.link_state.problem.reason


async def test_answers_keep_an_idle_link_from_being_checked(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        monitor = LinkMonitor(client)
        await monitor.step()
        before = client.meter.total
        await monitor.step()
        assert client.meter.total == before
        monkeypatch.setattr(link_monitor, "IDLE_CHECK_SECONDS", 0.0)
        await client.models()
        monitor._next_check = 0.0
        await monitor.step()
        assert client.meter.total > before
