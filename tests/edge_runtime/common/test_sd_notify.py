"""Notifications of the services to systemd, received on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.target import Target
from edge_runtime.common.sd_notify import Notifier
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol import messages
from edge_runtime.protocol.sampling import Sampling
from tests.conftest import FAMILY

pytestmark = pytest.mark.usefixtures("toy_bundle")

TIMEOUT_SECONDS = 300.0


class NotifySocket:
    """A notification socket like systemd's.

    Attributes:
        received: (arrival time, text) of all messages so far.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.received: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(TIMEOUT_SECONDS)

    def until(self, text: str) -> str:
        """Wait for the next message that contains `text`."""
        while True:
            message = self._socket.recv(1 << 16).decode()
            self.received.append((time.monotonic(), message))
            if text in message:
                return message

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notify(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NotifySocket]:
    listening = NotifySocket(getattr(request, "param", str(tmp_path / "notify")))
    yield listening
    listening.close()


@contextlib.contextmanager
def started(notify: NotifySocket, module: str, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """Start a service as systemd does."""
    environment = {**os.environ, "NOTIFY_SOCKET": notify.address, **environ}
    command = [sys.executable, "-m", module, "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().split()[-1]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not true():  # noqa: ASYNC110 - there is nothing to wait for but this
            await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("notify", [f"@flexspec-test-{os.getpid()}"], indirect=True, ids=["abstract"])
def test_a_board_is_ready_when_it_can_answer_and_feeds_its_watchdog(notify: NotifySocket) -> None:
    with started(notify, "edge_runtime.cli", WATCHDOG_USEC="900000") as process:
        assert notify.until("STATUS=") == "STATUS=loading the draft"
        assert notify.until("READY=1") == "READY=1\nSTATUS=no round yet, 0 answers"
        # A watchdog starts with READY=1: nothing was sent before.
        assert [text for _, text in notify.received if "WATCHDOG" in text] == []
        assert httpx.get(f"{url(process)}/healthz").status_code == 200
        # No verifier runs. systemd learns the reason as text and as a number.
        assert "STATUS=no verifier can be used since" in notify.until("STATUS=no verifier")
        assert notify.until("ERRNO=") == f"ERRNO={errno.ECONNREFUSED}"
        for _ in range(6):
            notify.until("WATCHDOG=1")
        times = [at for at, text in notify.received if text == "WATCHDOG=1"]
        # Three notifications per watchdog period; a busy machine may be late, but not always.
        assert sorted(b - a for a, b in itertools.pairwise(times))[2] < 0.9
        process.send_signal(signal.SIGTERM)
        assert notify.until("STOPPING=1").startswith("STOPPING=1\nSTATUS=")
        assert process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.slow
def test_a_board_without_a_draft_is_never_ready(notify: NotifySocket, tmp_path: Path) -> None:
    with started(notify, "edge_runtime.cli", "--bundle", str(tmp_path)) as process:
        assert process.wait(TIMEOUT_SECONDS) == 3
    notify._socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        notify.until("READY=1")


@pytest.mark.slow
def test_sighup_reads_the_configuration_again(notify: NotifySocket, tmp_path: Path) -> None:
    config, keys = tmp_path / "config.toml", tmp_path / "keys"
    keys.write_text("first-key")
    config.write_text('[service]\napi_key_file = "keys"\n')

    def status(key: str) -> int:
        # With a valid key: 415, because the body is not JSON.
        return httpx.post(f"{address}/v1/completions", headers={"authorization": f"Bearer {key}"}).status_code

    with started(notify, "edge_runtime.cli", FLEXSPEC_CONFIG=str(config)) as process:
        notify.until("READY=1")
        address = url(process)
        assert (status("first-key"), status("second-key")) == (415, 401)

        keys.write_text("second-key")
        config.write_text('[service]\napi_key_file = "keys"\nport = 1234\n[planner]\npolicy = "ucb"\n')
        process.send_signal(signal.SIGHUP)
        reloading = dict(line.split("=") for line in notify.until("RELOADING=1").splitlines())
        assert abs(int(reloading["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < 60.0
        assert notify.until("READY=1").endswith("no round yet, 0 answers")
        assert (status("first-key"), status("second-key")) == (401, 415)

        keys.write_text("")
        config.write_text("[planner\n")
        process.send_signal(signal.SIGHUP)
        assert "the configuration has errors" in notify.until("READY=1")
        assert (status("first-key"), status("second-key")) == (401, 415)

        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT_SECONDS)
    assert "configuration reloaded; changed: planner.policy\n" in said
    # The port was given on the command line, which is not read again.
    assert "restart" not in said
    # Line breaks within a record are escaped.
    assert f"the previous one stays in use: an error in the configuration:\\n  {config}:1:" in said


@pytest.mark.slow
def test_a_token_that_is_new_goes_to_no_verifier_of_the_start_in_clear(notify: NotifySocket, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    (tmp_path / "token").write_text("secret")
    config.write_text('[verifier]\nurls = ["http://verifier.invalid"]\ninsecure = true\n')
    with started(notify, "edge_runtime.cli", FLEXSPEC_CONFIG=str(config)) as process:
        notify.until("READY=1")
        # The new URL takes effect only after a restart.
        config.write_text('[verifier]\nurls = ["https://verifier.invalid"]\ntoken_file = "token"\n')
        process.send_signal(signal.SIGHUP)
        assert "the configuration has errors" in notify.until("READY=1")
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT_SECONDS)
    assert "the token would be sent to http://verifier.invalid unencrypted" in said


@pytest.mark.slow
def test_a_verifier_is_ready_when_its_target_is(notify: NotifySocket) -> None:
    arguments = (str(FAMILY / "target-v1"), "--threads", "1")
    with started(notify, "cloud_verifier.cli", *arguments, WATCHDOG_USEC="900000") as process:
        assert notify.until("STATUS=") == "STATUS=loading the target"
        assert "STATUS=target-v1@" in notify.until("READY=1")
        assert httpx.get(f"{url(process)}/readyz").status_code == 200
        for _ in range(3):
            notify.until("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        notify.until("STOPPING=1")
        assert process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.slow
async def test_a_stalled_service_does_not_feed_the_watchdog(notify: NotifySocket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": notify.address, "WATCHDOG_USEC": "300000"})
    stalled = 0.0
    telling = asyncio.create_task(notifier.run(lambda: "fine", lambda: stalled))
    await asyncio.to_thread(notify.until, "WATCHDOG=1")
    stalled = 0.4
    await asyncio.to_thread(notify.until, "STATUS=stalled: no progress for 0 s")
    notify.received.clear()
    await asyncio.sleep(0.5)
    stalled = 0.0
    await asyncio.to_thread(notify.until, "STATUS=fine")
    assert [text for _, text in notify.received] == ["STATUS=fine"]
    telling.cancel()


def test_without_a_usable_socket_nothing_happens(tmp_path: Path) -> None:
    notifier = Notifier({})
    notifier.ready("fine")
    assert not notifier.enabled and notifier.watchdog_seconds is None
    # A socket that is gone, or of a kind for virtual machines, is ignored.
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("fine")
    assert not Notifier({"NOTIFY_SOCKET": "vsock:2:1234", "WATCHDOG_USEC": "1000000"}).enabled


def test_the_watchdog_of_another_process_is_ignored() -> None:
    for environ, seconds in (
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ):
        assert Notifier({"NOTIFY_SOCKET": "/run/nothing", **environ}).watchdog_seconds == seconds


def test_a_draft_reports_the_age_of_its_current_step(shipped_draft: OnnxDraft) -> None:
    assert shipped_draft.step_seconds == 0.0
    context = shipped_draft.new_context()
    reading = threading.Thread(target=context.prefill, args=([1] * context.limit,))
    reading.start()
    seen = 0.0
    while reading.is_alive():
        seen = max(seen, shipped_draft.step_seconds)
    assert seen > 0.0
    assert shipped_draft.step_seconds == 0.0
    # A step that fails counts as ended, too.
    with contextlib.suppress(Exception):
        shipped_draft.new_context().prefill([10**9])
    assert shipped_draft.step_seconds == 0.0


async def test_an_engine_reports_the_age_of_its_current_forward(tiny: Target) -> None:
    held, go_on = threading.Event(), threading.Event()

    class Held(Target):
        def __init__(self) -> None:
            vars(self).update(vars(tiny))

        def run(self, *arguments: object):  # type: ignore[no-untyped-def]
            held.set()
            go_on.wait(TIMEOUT_SECONDS)
            return super().run(*arguments)  # type: ignore[arg-type]

    engine = Scheduler(Held, lambda target: None, lambda: 0)
    assert engine.stalled_seconds == float("inf")
    engine.start()
    await until(lambda: engine.target is not None)
    assert engine.stalled_seconds == 0.0
    answer = RoundReply(messages.RoundRequest(messages.PROTOCOL_VERSION, 0, 3, [], n=1))
    engine.submit(Session([1, 2, 3], Sampling(), engine.target, answer), answer)
    await asyncio.to_thread(held.wait, TIMEOUT_SECONDS)
    await asyncio.sleep(0.05)
    assert engine.stalled_seconds >= 0.05
    go_on.set()
    await answer.result()
    await until(lambda: not engine.stalled_seconds)
    engine.stop()
    # Its thread has ended, so requests would hang: that counts as stalled.
    assert engine.stalled_seconds == float("inf")
