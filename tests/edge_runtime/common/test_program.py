"""What ends every program: one sentence and an exit code, also where standard output cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from edge_runtime.common.options import number, whole_number

PROGRAMS = ("edge_runtime.cli", "cloud_verifier.cli", "export.cli", "device_profiles.cli")
RUN = [sys.executable, "-c", "import sys; from edge_runtime.common.program import run_program as run; sys.exit({})"]


def run_with_output(program: str, output: str) -> subprocess.CompletedProcess[str]:
    """Run a program's code with a file as its standard output."""
    with Path(output).open("w") as file:
        command = [*RUN[:2], RUN[2].format(program)]
        return subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("flush", ["False", "True"])
def test_a_full_disk_under_the_output_is_one_sentence(flush: str) -> None:
    done = run_with_output(f"run('program', lambda: print('x', flush={flush}) or 0)", "/dev/full")
    assert (done.returncode, done.stderr) == (1, "program: cannot write the output: No space left on device\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [*RUN[:2], RUN[2].format("run('program', lambda: [print('x' * 100) for _ in range(10**6)] and 0)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 0)


def test_other_errors_keep_their_traceback() -> None:
    done = run_with_output("run('program', lambda: open('/nowhere'))", "/dev/null")
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_shows_its_version(program: str) -> None:
    command = [sys.executable, "-m", program, "--version"]
    assert subprocess.check_output(command, text=True).split()[-1].count(".") == 2


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "-inf", "1e400", "8"])
def test_numbers_outside_their_range_are_refused(text: str) -> None:
    with pytest.raises(Exception, match=f"{text} is not between 0 and 7"):
        number(0, 7)(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("7", 7), ("007", 7)])
def test_numbers_within_their_range_are_taken(text: str, value: int) -> None:
    assert number(0, 7)(text) == whole_number(0, 7)(text) == value


@pytest.mark.parametrize("text", ["-1", "8"])
def test_whole_numbers_outside_their_range_are_refused(text: str) -> None:
    with pytest.raises(Exception, match=f"{text} is not between 0 and 7"):
        whole_number(0, 7)(text)


@pytest.mark.parametrize("arguments", [["serve", "--port", "x"], ["generate", "--max-new-tokens", "1.5"]])
def test_what_is_no_number_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "invalid" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["\udcff\udcfe", "x = \udcff"])
def test_a_prompt_that_is_not_utf_8_is_refused(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", prompt]) == 2
    assert "the prompt is not UTF-8" in capsys.readouterr().err


def test_a_prompt_from_a_file_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--file", "/dev/zero"]) == 2
    assert "the prompt has more than 16777216 bytes" in capsys.readouterr().err
