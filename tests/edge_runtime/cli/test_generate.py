"""`edge-runtime` as people run it: real processes, a real verifier, the shipped family."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

PROMPT = "def read_config(path):\n"
MEGABYTE = 1 << 20
# A board has no torch; whatever imports it there fails. Here it is installed, so its absence must be watched.
HEAVY = ("torch", "transformers", "optimum", "peft", "scipy", "onnx.")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def verifier(family: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(family / "target-v1"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[-1]
        # It listens while it loads; requests meanwhile are repeated, and that costs bytes.
        while httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.1)
        yield url
        process.terminate()


def test_generates_from_argument_file_and_standard_input_alike(verifier: str, tmp_path: Path) -> None:
    options = ("--verifier", verifier, "--max-new-tokens", "24")
    by_argument = run("generate", PROMPT, *options)
    assert by_argument.returncode == 0, by_argument.stderr
    (tmp_path / "prompt").write_text(PROMPT)
    assert run("generate", "--file", str(tmp_path / "prompt"), *options).stdout == by_argument.stdout
    assert run("generate", *options, input=PROMPT).stdout == by_argument.stdout
    assert "tokens in" in by_argument.stderr
    assert "\x1b" not in by_argument.stdout


def test_json_says_everything(verifier: str) -> None:
    shared = ("--verifier", verifier, "--max-new-tokens", "100", "--ignore-eos", "--json", "--seed", "7")
    answers = [
        json.loads(run("generate", PROMPT, *shared, "--temperature", "0.7", "--num-assistant-tokens", k).stdout)
        for k in ("0", "5")
    ]
    assert answers[0]["ids"] == answers[1]["ids"]
    answer = answers[1]
    statistics = answer["statistics"]
    assert len(answer["ids"]) == statistics["tokens"] == 100
    assert answer["version"].startswith("target-v1@")
    assert sum(statistics["accepted_at"]) == statistics["accepted"] <= statistics["drafted"]
    assert statistics["drafted_at"][0] == max(statistics["drafted_at"])
    assert 0 < answer["acceptance"] < 1


FIXED = ("--policy", "fixed")


@pytest.mark.parametrize(
    ("options", "limit"), [(FIXED, 5000), ((*FIXED, "--no-http2"), 10_000), ((), 10_000)], ids=["2", "1.1", "planned"]
)
def test_a_hundred_tokens_cost_few_kilobytes(verifier: str, options: tuple[str, ...], limit: int) -> None:
    """A planner that goes by time plans shorter rounds on a busy machine, and those cost more bytes: it has room."""
    arguments = ("--verifier", verifier, "--max-new-tokens", "100", "--ignore-eos", "--json")
    answer = run("generate", PROMPT, *arguments, *options)
    statistics = json.loads(answer.stdout)["statistics"]
    assert statistics["tokens"] == 100
    assert 500 < statistics["bytes_sent"] + statistics["bytes_received"] <= limit


def test_the_board_stays_small(verifier: str) -> None:
    """Under 150 MB of resident memory at its peak, and nothing heavy imported."""
    program = (
        "import re, sys\n"
        "from edge_runtime.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(code, peak, *sys.modules, file=sys.stderr)\n"
    )
    arguments = ["generate", PROMPT, "--verifier", verifier, "--max-new-tokens", "100", "--quiet"]
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    code, peak, *modules = result.stderr.split()
    assert code == "0"
    assert int(peak) * 1024 < 150 * MEGABYTE
    assert not [module for module in modules if module.startswith(HEAVY)]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["generate", ""], 2, "the prompt is empty"),
        (["generate", "x", "--file", "/nowhere"], 2, "not both"),
        (["generate", "--file", "/nowhere"], 2, "cannot read the prompt"),
        (["generate", "x", "--temperature", "-1"], 2, "temperature must be"),
        (["generate", "x", "--top-p", "0"], 2, "top_p"),
        (["generate", "x", "--max-new-tokens", "0"], 2, "nothing to generate"),
        (["generate", "x", "--siblings", "-1"], 2, "--siblings -1"),
        (["generate", "x", "--siblings", "1", "--policy", "ucb"], 2, "--siblings is part of a fixed plan"),
        (["generate", "x", "--objective", "cheap"], 2, "is no objective: name one of latency"),
        (["generate", "x", "--profile", "toaster"], 2, "no shipped profile 'toaster': there are"),
        (["generate", "x", "--profile", "/nowhere.toml"], 2, "cannot read the profile /nowhere.toml"),
        (["generate", "x", "--energy-budget", "plenty"], 2, "is no energy budget"),
        (["generate", "x", "--bundle", "/nowhere"], 3, "no draft bundle at /nowhere"),
        (["generate", "x", "--verifier", "nonsense"], 2, "is not the URL of a verifier"),
        (["generate", "x", "--verifier", "http://127.0.0.1:9", "--deadline", "0.3"], 4, "is it running"),
    ],
)
def test_errors_are_a_sentence_and_an_exit_code(arguments: list[str], code: int, sentence: str) -> None:
    result = run(*arguments, input="")
    assert result.returncode == code
    assert result.stderr.startswith("edge-runtime: ")
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("policy", ["analytic", "hf-dynamic", "genai-ewma", "ucb"])
def test_every_policy_writes_the_same_text_and_says_why(verifier: str, policy: str) -> None:
    shared = ("generate", PROMPT, "--verifier", verifier, "--max-new-tokens", "48", "--ignore-eos")
    options = ("--policy", policy, "--objective", "balanced", "--profile", "raspberry-pi-5", "--radio", "wifi")
    answer = run(*shared, *options, "--energy-budget", "40000", "--explain")
    assert answer.stdout == run(*shared, "--num-assistant-tokens", "3").stdout
    decisions = [line for line in answer.stderr.splitlines() if line.startswith("edge_runtime.decoding: position ")]
    # Of rounds that were sent early and came to nothing, too.
    assert len(decisions) >= int(re.search(r"in (\d+) rounds", answer.stderr)[1])
    assert all(re.search(r"K=\d+ n=\d+, \S", line) for line in decisions)


def test_the_configuration_speaks_where_no_option_does(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[verifier]\nurls = ["http://127.0.0.1:9"]\ndeadline_seconds = 0.3\n')
    configured = run("generate", "x", "--config", str(file))
    assert (configured.returncode, "no usable answer from http://127.0.0.1:9 within 0." in configured.stderr) == (
        4,
        True,
    )
    told = run("generate", "x", "--verifier", "http://127.0.0.1:10", env=os.environ | {"FLEXSPEC_CONFIG": str(file)})
    assert "no usable answer from http://127.0.0.1:10 within 0." in told.stderr
    file.write_text("[verifier]\nurl = 3\n")
    wrong = run("generate", "x", "--config", str(file))
    assert wrong.returncode == 2
    assert f"{file}:2:1: " in wrong.stderr


def test_a_refusal_names_its_code(verifier: str) -> None:
    result = run("generate", "x", "--verifier", verifier, "--model", "gpt")
    assert result.returncode == 4
    assert "[unknown_model]" in result.stderr


def test_a_reader_that_leaves_is_no_error(verifier: str) -> None:
    command = f"{sys.executable} -m edge_runtime.cli generate 'import os' --verifier {verifier} | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_demo_is_exact(family: Path) -> None:
    result = run("demo", "--max-new-tokens", "32", env=os.environ | {"COLUMNS": "120"})
    assert result.returncode == 0, result.stderr
    assert "exact: yes" in result.stdout
    rows = [
        line.split() for line in result.stdout.splitlines() if line.strip().startswith(("target-v1 ", "target-v2 "))
    ]
    assert [row[-1] for row in rows] == ["yes"] * 6


def test_help_has_examples() -> None:
    assert "edge-runtime generate" in run("--help").stdout
    assert "--num-assistant-tokens" in run("generate", "--help").stdout
