"""`edge-runtime chat` from a pipe and on a pseudo-terminal, with a real verifier and the toy family."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import socket
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_runtime.protocol.bundle import ChatFormat, SamplingDefaults
from tests.edge_runtime.commands import run
from tests.edge_runtime.service.conftest import write_chat_bundle

# The toy model writes Python, so the conversation is one.
TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}# assistant\n"
FIRST, SECOND = "def read_config(path):", "class Connection:"
NEW_TOKENS = 12
OPTIONS = ("--policy", "fixed", "--threads", "1", "--max-new-tokens", str(NEW_TOKENS))
LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chat = ChatFormat({"default": TEMPLATE}, sampling=SamplingDefaults(temperature=0.0))
    return write_chat_bundle(tmp_path_factory.mktemp("chat"), chat)


def arguments(bundle: Path, verifier: str, *options: str) -> list[str]:
    return ["chat", "--bundle", str(bundle), "--verifier", verifier, *OPTIONS, *options]


def command(bundle: Path, verifier: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "edge_runtime.cli", *arguments(bundle, verifier, *options)]


def chat_through_pipes(lines: list[str], bundle: Path, verifier: str, *options: str) -> CompletedProcess[str]:
    return run(*arguments(bundle, verifier, *options), stdin="".join(f"{line}\n" for line in lines))


def answer_of_transformers(family: Path, messages: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(family / "target-v1")
    model = AutoModelForCausalLM.from_pretrained(family / "target-v1", dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    answer: str = tokenizer.decode(new, skip_special_tokens=True)
    return answer


@pytest.mark.slow
def test_answers_are_those_of_the_target_with_the_whole_conversation(family: Path, bundle: Path, verifier: str) -> None:
    done = chat_through_pipes([FIRST, SECOND, "/reset", SECOND], bundle, verifier, "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": FIRST}]
    first = answer_of_transformers(family, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": SECOND}]
    second = answer_of_transformers(family, messages)
    third = answer_of_transformers(family, [system, {"role": "user", "content": SECOND}])
    assert done.stdout == f"{first}\n{second}\n{third}\n"
    assert second != third
    assert done.stderr.count(" tokens in ") == 3


@pytest.mark.slow
def test_a_target_here_gets_a_verifier_of_its_own(family: Path, bundle: Path) -> None:
    done = chat_through_pipes([FIRST], bundle, "http://127.0.0.1:9", "--target", str(family / "target-v1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer_of_transformers(family, [{"role": "user", "content": FIRST}]) + "\n"


@pytest.mark.slow
def test_without_a_template_the_chat_says_so_and_is_plain(family: Path, verifier: str) -> None:
    done = chat_through_pipes([FIRST], family / "bundle", verifier)
    assert done.returncode == 0, done.stderr
    assert "no chat template" in done.stderr
    assert "User:" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--bundle", "/nowhere"], 2, "there is no directory /nowhere"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--verifier", "http://127.0.0.1:9", "--deadline", "0.2"], 4, "127.0.0.1:9"),
    ],
)
def test_errors_from_a_pipe_end_the_chat_with_their_exit_code(
    bundle: Path, options: list[str], code: int, message: str
) -> None:
    done = chat_through_pipes([FIRST], bundle, "http://127.0.0.1:9", *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


class Terminal:
    """A process on a pseudo-terminal.

    Attributes:
        shown: everything that it has written.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.shown = ""
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
        self._pid, self._file = pty.fork()
        if not self._pid:
            os.execve(arguments[0], arguments, environment)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def _search(self, pattern: str, seconds: float) -> re.Match[str] | None:
        """Read for up to `seconds`, until `pattern` appears in what was not expected before."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown[self._read :])) and (left := end - time.monotonic()) > 0:
            if select.select([self._file], [], [], left)[0]:
                try:
                    self.shown += os.read(self._file, 65536).decode(errors="replace")
                except OSError:
                    pytest.fail(f"the process ended: {self.shown}")
        return found

    def expect(self, pattern: str) -> str:
        """Wait until `pattern` appears in what was not expected before; return the text up to its end."""
        found = self._search(pattern, LIMIT_SECONDS)
        assert found, self.shown
        text = self.shown[self._read : self._read + found.end()]
        self._read += found.end()
        return text

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until `pattern` appears: Python notices one that comes while it reads a key with the next."""
        end = time.monotonic() + LIMIT_SECONDS
        self.type("\x03")
        # A second one while the first is answered would end the process.
        while not self._search(pattern, 5.0):
            assert time.monotonic() < end, self.shown
            self.type("\x03")
        self.expect(pattern)

    _read = 0

    def wait(self) -> int:
        """Return the exit code."""
        with contextlib.suppress(OSError):
            while os.read(self._file, 65536):
                pass
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


PROMPT = r"> \x1b\[0m"


@pytest.mark.slow
def test_a_terminal_shows_colors_edits_lines_and_runs_commands(bundle: Path, verifier: str) -> None:
    terminal = Terminal(command(bundle, verifier))
    terminal.expect(PROMPT)
    # Backspace is readline's; the first answer is then that of the right text.
    terminal.type("def read_confog\x7f\x7fig(path):\n")
    shown = terminal.expect(r"tokens in [\s\S]*" + PROMPT)
    assert "\x1b[32m" in shown or "\x1b[33m" in shown
    terminal.type("\x1b[A")  # the arrow up brings the line back, as it was corrected
    terminal.expect(r"def read_config\(path\):")
    terminal.type("\x15/help\n")
    terminal.expect("/system TEXT")
    terminal.expect(PROMPT)
    terminal.type("/hlep\n")
    terminal.expect("no command /hlep")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_keeps_the_session(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        terminal = Terminal(command(bundle, f"http://127.0.0.1:{silent.getsockname()[1]}"))
        terminal.expect(PROMPT)
        for _ in range(2):
            terminal.type(f"{FIRST}\n")
            connection, _ = silent.accept()
            terminal.type("\x03")
            terminal.expect(r"\(stopped\)")
            terminal.expect(PROMPT)
            connection.close()
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.interrupt(r"/quit leaves")
        terminal.expect(PROMPT)
        terminal.type("/quit\n")
        assert terminal.wait() == 0


@pytest.mark.slow
def test_an_unreachable_verifier_does_not_end_a_session_on_a_terminal(bundle: Path) -> None:
    terminal = Terminal(command(bundle, "http://127.0.0.1:9", "--deadline", "0.2"))
    terminal.expect(PROMPT)
    terminal.type(f"{FIRST}\n")
    terminal.expect("the message was not answered")
    terminal.expect(PROMPT)
    terminal.type("/quit\n")
    assert terminal.wait() == 0
