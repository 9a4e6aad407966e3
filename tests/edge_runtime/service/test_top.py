"""`edge-runtime top`, on a terminal and in scripts."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import get_args

import msgspec
import openai
import pytest
from rich.console import Console

from edge_runtime.cli.main import main
from edge_runtime.cli.top_view import TOKEN_STYLES, DashboardView, sparkline
from edge_runtime.service.monitoring.dashboard_state import MAX_TOKENS, DashboardState
from edge_runtime.service.monitoring.events import (
    AnswerFinished,
    AnswerStarted,
    AnyEvent,
    BoardInfo,
    Event,
    GaugeSample,
    PlanChosen,
    Privacy,
    RoundFinished,
    TokensAdded,
)
from edge_runtime.service.monitoring.words import load_words
from tests.edge_runtime.commands import run
from tests.edge_runtime.service.conftest import board_process

PROMPT = "def read_config(path):\n"
COMMAND = [sys.executable, "-m", "edge_runtime.cli", "top"]


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("top", *arguments)


@pytest.mark.slow
def test_once(url: str, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=24)
    done = top("--url", url, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(done.stdout.split())
    assert "on this machine" in shown
    assert "This board drafts 5 tokens; the target model verifies them and adds 1 token. Reason: fixed plan" in shown
    assert "Last round: " in shown
    assert f"target model {answer.system_fingerprint}" in shown
    assert answer.choices[0].text.split()[0] in shown
    # This machine has no battery sensor, so there is no row for it.
    assert "Battery" not in shown
    # Without a terminal, --once is the default.
    assert "This board drafts 5 tokens" in top("--url", url).stdout


@pytest.mark.slow
def test_once_as_json(url: str, client: openai.OpenAI) -> None:
    client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=24)
    done = top("--url", url, "--once", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary["board"]["type"] == "board"
    assert summary["gauges"]["tokens"] >= 24
    assert 0 < summary["gauges"]["accepted"] <= summary["gauges"]["drafted"]
    # Covers the last ten seconds only, which may hold no rounds.
    assert 0 <= summary["rates"].get("acceptance", 0) <= 1
    assert (summary["plan"]["draft"], summary["plan"]["reason"]) == (5, "fixed")
    assert summary["round"]["sent"] > 0
    assert PROMPT.strip() not in line


def test_json_prints_every_event_as_a_line(url: str, client: openai.OpenAI) -> None:
    with subprocess.Popen(
        [*COMMAND, "--url", url, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=4)
        kinds = set()
        while not {"board", "gauges", "tokens", "round", "planned", "begun", "ended"} <= kinds:
            kinds.add(json.loads(process.stdout.readline())["type"])
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
        assert (process.returncode, error) == (130, b"")


@pytest.mark.slow
@pytest.mark.parametrize(("key", "code"), [("q", 0), ("\x03", 130)])
def test_live_view_until_a_key_ends_it(url: str, client: openai.OpenAI, key: str, code: int) -> None:
    main_end, child_end = pty.openpty()
    before = termios.tcgetattr(child_end)
    with subprocess.Popen(
        [*COMMAND, "--url", url],
        stdout=child_end,
        stderr=child_end,
        stdin=child_end,
        env=os.environ | {"TERM": "xterm"},
        # The terminal is its own, so that ^C reaches it as a signal.
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    ) as process:
        client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=8)
        seen = read_until(main_end, "Last round")
        assert "q quits" in seen
        os.write(main_end, key.encode())
        # What it shows has to be read, or it would wait.
        while process.poll() is None:
            if select.select([main_end], [], [], 0.1)[0]:
                seen += os.read(main_end, 65536).decode(errors="replace")
        assert process.wait(300) == code
    # The terminal is as it was before: characters are shown again.
    assert termios.tcgetattr(child_end) == before
    os.close(child_end)
    seen += read_until(main_end, None)
    os.close(main_end)
    assert "Traceback" not in seen
    # The terminal has left the alternate screen.
    assert seen.rfind("\x1b[?1049l") > seen.rfind("\x1b[?1049h") >= 0


def read_until(terminal: int, words: str | None, seconds: float = 300.0) -> str:
    """Return what the terminal shows until `words` appear, or until it closes."""
    seen, end = "", time.monotonic() + seconds
    while words is None or words not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                return seen
            if not data:
                return seen
            seen += data.decode(errors="replace")
    return seen


@pytest.mark.slow
def test_api_key(verifier: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("first-key\n")
    options = ("--api-key-file", str(tmp_path / "key"))
    with board_process(verifier, *options, "--policy", "fixed", "--threads", "1") as (_, url):
        without = top("--url", url, "--once")
        assert (without.returncode, without.stdout) == (2, "")
        assert "--api-key-file" in without.stderr
        assert top("--url", url, "--once", "--json", *options).returncode == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--url", "http://127.0.0.1:1"], 4, "no service answers at http://127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1", "--json"], 4, "is `edge-runtime serve` running"),
        (["--url", "nonsense"], 2, "not the URL of a service"),
        (["--url", "http://127.0.0.1:99999"], 2, "not the URL of a service"),
        (["--url", "http://a:x"], 2, "--url http://a:x: "),
        (["--api-key-file", "/nowhere"], 2, "cannot read /nowhere"),
        (["--ca-file", "/nowhere", "--url", "https://127.0.0.1:1"], 2, "cannot trust the authorities"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(
    options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--once", *options]) == code
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("edge-runtime: ")
    assert message in error


def test_an_api_key_is_never_sent_unencrypted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("first-key\n")
    assert main(["top", "--url", "http://board.example:8400", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "unencrypted" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_not_a_board_is_an_error(verifier: str) -> None:
    done = top("--url", verifier, "--once")
    assert done.returncode == 4
    assert "check --url" in done.stderr


# Rendering without a service


def gauges(at: float, **fields: object) -> GaugeSample:
    neutral = dict.fromkeys(
        ("running", "waiting", "tokens", "rounds", "drafts", "drafted", "accepted", "sent", "received"), 0
    )
    return GaugeSample(**{"at": at, "verifier": "https://v.example", "privacy": "tls", **neutral, **fields})  # type: ignore[arg-type]


def shown(dashboard: DashboardState, width: int = 120, height: int = 40, *, screen: bool = False) -> str:
    console = Console(width=width, height=height, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(DashboardView(dashboard, "live", screen=screen, keys="q quits"))
    return console.export_text(styles=True)


def dashboard_of(*events: Event) -> DashboardState:
    dashboard = DashboardState()
    for event in events:
        # Encoded and decoded, as they arrive over the wire.
        dashboard.apply(msgspec.json.decode(msgspec.json.encode(event), type=AnyEvent))
    return dashboard


BEGUN = AnswerStarted(
    at=1,
    answer=7,
    prompt="p",
    prompt_tokens=1,
    max_new_tokens=9,
    temperature=0,
    seed=0,
    speculation=True,
    queued_seconds=0,
)


def round_(**fields: object) -> RoundFinished:
    neutral = dict.fromkeys(
        (
            "planned",
            "drafted",
            "accepted",
            "own",
            "draft_seconds",
            "link_seconds",
            "verifier_seconds",
            "sent",
            "received",
        ),
        0,
    )
    return RoundFinished(**{"at": 2, "answer": 7, **neutral, **fields})  # type: ignore[arg-type]


def test_token_kinds_corrections_and_withdrawn_tokens() -> None:
    dashboard = dashboard_of(
        BEGUN,
        TokensAdded(at=2, answer=7, accepted=["a"], own=["b"]),
        round_(drafted=3, accepted=1, own=1, corrected=1),
        TokensAdded(at=3, answer=7, unverified=["c", "x"]),
        TokensAdded(at=4, answer=7, accepted=["c"], own=["d"], withdrawn=["x"]),
        # Another answer: only its rounds and plans are shown.
        TokensAdded(at=5, answer=6, own=["z"]),
        round_(answer=6, drafted=1, corrected=0),
    )
    assert dashboard.tokens == [
        ["accepted", "a"],
        ["corrected", "b"],
        ["accepted", "c"],
        ["withdrawn", "x"],
        ["own", "d"],
    ]
    for number in range(MAX_TOKENS):
        dashboard.apply(TokensAdded(at=6.0, answer=7, own=[str(number)]))
    assert len(dashboard.tokens) == MAX_TOKENS


def test_rates_and_sparklines() -> None:
    dashboard = dashboard_of(
        gauges(0.0),
        gauges(1.0, tokens=30, drafts=4, drafted=20, accepted=15, sent=100, received=50),
        gauges(3.0, tokens=30, drafts=4, drafted=20, accepted=15, sent=100, received=50),
    )
    first, second, third = dashboard.rates
    assert first.tokens_per_second is None
    assert (second.tokens_per_second, second.bytes_per_second) == (30.0, 150.0)
    assert (second.acceptance, second.draft_length) == (0.75, 5.0)
    assert (third.tokens_per_second, third.acceptance) == (0.0, 0.75)
    dashboard.apply(gauges(20.0, drafted=20))
    assert dashboard.rates[-1].acceptance is None
    assert sparkline([None, 0.0, 5.0, 10.0]) == " ▁▅█"
    assert sparkline([0.1], min_scale=10.0) == "▁"


def test_a_restart_of_the_service_resets_the_dashboard() -> None:
    board = BoardInfo(at=1, feed="a", version="1", ready=True, verifier="v", privacy="tls", max_new_tokens=1)
    dashboard = dashboard_of(board, BEGUN, gauges(1.0), board)
    assert dashboard.started is not None
    dashboard.apply(msgspec.structs.replace(board, feed="b"))
    assert (dashboard.started, list(dashboard.gauges)) == (None, [])


def test_sensors_faults_and_encryption_are_shown() -> None:
    sensors = {"watts": 5.5, "joules": 12.0, "energy": "profile", "celsius": 61.0, "battery_percent": 63.0}
    text = shown(dashboard_of(gauges(1.0, **sensors, throttled=True, fault="the link is down", privacy="clear")))
    for words in (
        "5.5 W",
        "modeled",
        "61.0 °C",
        "63 %",
        "throttled",
        "The link is down",
        "NOT encrypted",
    ):
        assert words in text
    assert "Temperature" not in shown(dashboard_of(gauges(1.0)))


@pytest.mark.parametrize("hostile", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202egnp", "\r\x08"])
def test_control_characters_in_model_output_do_not_reach_the_terminal(hostile: str) -> None:
    dashboard = dashboard_of(
        msgspec.structs.replace(BEGUN, prompt=f"p{hostile}"),
        TokensAdded(at=2, answer=7, own=[f"t{hostile}", "[bold]not markup[/bold]"]),
        PlanChosen(at=3, answer=7, draft=1, own=1, reason="r"),
        AnswerFinished(at=4, answer=7, outcome="stop", tokens=1, drafted=0, accepted=0, rounds=1, seconds=1),
    )
    text = re.sub(r"\x1b\[[\d;]*m", "", shown(dashboard))
    for control in set(hostile) - {"\n"}:
        if not control.isprintable():
            assert control not in text
    assert "[bold]not markup[/bold]" in text


ANSWERED = (
    gauges(0.0),
    gauges(1.0, version="target@0123", verifier="https://a-verifier-with-a-long-name.example"),
    BEGUN,
    PlanChosen(at=2, answer=7, draft=4, own=1, reason="drafting 4 tokens: 20 ms/token drafted, 40 streamed"),
    *(TokensAdded(at=3, answer=7, accepted=["line", f" {number}"], own=[" of the text\n"]) for number in range(60)),
    round_(drafted=4, accepted=2, own=1, draft_seconds=0.01, link_seconds=0.03, verifier_seconds=0.04),
)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_narrow_terminals(width: int) -> None:
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown(dashboard_of(*ANSWERED), width)).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    for part in ("target@0123", "tokens/s", "ms", "q quits"):
        assert part in words


@pytest.mark.parametrize("height", [24, 40])
def test_the_newest_text_is_shown_where_there_is_little_room(height: int) -> None:
    lines = shown(dashboard_of(*ANSWERED), 80, height, screen=True).splitlines()
    assert len(lines) <= height
    assert any("line 59 of the text" in re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines)


def test_the_bar_of_times_is_to_scale() -> None:
    (bar,) = [line for line in shown(dashboard_of(*ANSWERED), 80).splitlines() if "━" in line]
    parts = [len(re.sub(r"\x1b\[[\d;]*m", "", part)) for part in re.findall(r"(?<=m)━+", bar)]
    assert parts == [10, 30, 40]


def test_answers_without_verification_are_counted_and_marked() -> None:
    finished = AnswerFinished(
        at=4, answer=7, outcome="stop", tokens=0, drafted=0, accepted=0, rounds=0, seconds=1, unverified=5
    )
    dashboard = dashboard_of(gauges(1.0, unverified_answers=2), BEGUN, finished)
    text = shown(dashboard)
    assert "2 answers ended without verification" in text
    assert "complete, 5 drafted by this board, not verified" in text


def test_the_words_of_the_views_have_all_that_they_need() -> None:
    words = load_words()
    assert set(words.tokens) == set(TOKEN_STYLES)
    assert set(words.privacy) == set(get_args(Privacy))
    names = {name for form in words.plans.values() for name in re.findall(r"{(\w+)}", form)}
    assert names == {"draft", "own"}
