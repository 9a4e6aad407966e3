"""`edge-runtime generate` with a real verifier and the toy family; in a process of its own where that matters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from tests.edge_runtime.commands import run

pytestmark = pytest.mark.usefixtures("toy_bundle")

PROMPT = "def read_config(path):\n"
MEGABYTE = 1 << 20
# Not installed on a board. Here they are, so check that nothing imports them.
FORBIDDEN = ("torch", "transformers", "optimum", "peft", "scipy", "onnx.")


def run_process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.slow
def test_a_prompt_can_be_an_argument_a_file_or_standard_input(verifier: str, tmp_path: Path) -> None:
    options = ("--verifier", verifier, "--max-new-tokens", "24")
    by_argument = run("generate", PROMPT, *options)
    assert by_argument.returncode == 0, by_argument.stderr
    (tmp_path / "prompt").write_text(PROMPT)
    assert run("generate", "--file", str(tmp_path / "prompt"), *options).stdout == by_argument.stdout
    assert run_process("generate", *options, input=PROMPT).stdout == by_argument.stdout
    assert "tokens in" in by_argument.stderr
    assert "\x1b" not in by_argument.stdout


@pytest.mark.slow
def test_what_the_planner_learns_survives_the_process(verifier: str, tmp_path: Path) -> None:
    options = ("--verifier", verifier, "--max-new-tokens", "48", "--ignore-eos", "--planner-state", str(tmp_path))
    budgets, texts = [], []
    for _ in range(3):
        answer = run_process("generate", PROMPT, *options, "--explain")
        assert answer.returncode == 0, answer.stderr
        texts.append(answer.stdout)
        budgets.append([int(tokens) for tokens in re.findall(r"regret budget (-?\d+) tokens", answer.stderr)])
        state = json.loads((tmp_path / "planner.json").read_text())["state"]
        # The next process continues with this budget, to the token.
        budgets.append([round(state["regret_tokens"])])
        assert [record["version"].split("@")[0] for record in state["acceptance"]] == ["target-v1"]
    assert len(set(texts)) == 1
    assert budgets[0][0] == 20
    assert budgets[2][0] == budgets[1][0] and budgets[4][0] == budgets[3][0]


@pytest.mark.slow
def test_sampling_options_mean_the_same_to_the_target_alone(
    verifier: str, family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The board does not show the stop id, a newline; the target alone prints it."""
    options = ("--max-new-tokens", "60", "--temperature", "0.8", "--seed", "4", "--min-p", "0.02", "--min-tokens", "20")
    options += ("--repetition-penalty", "1.1", "--presence-penalty", "0.2", "--frequency-penalty", "0.1")
    options += ("--logit-bias", "13=1.5", "--logit-bias", "311=-100", "--stop-id", "200")
    answer = run("generate", PROMPT, "--verifier", verifier, "--json", *options)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert (report["finish"], report["ids"].index(200)) == ("stop", len(report["ids"]) - 1)
    from cloud_verifier.cli.main import main as cloud_main

    assert cloud_main(["generate", str(family / "target-v1"), PROMPT, *options]) == 0
    assert capsys.readouterr().out == PROMPT + report["text"] + "\n\n"


@pytest.mark.slow
@pytest.mark.parametrize("option", [("--logit-bias", "5"), ("--logit-bias", "5=1000"), ("--repetition-penalty", "0")])
def test_invalid_sampling_options_are_refused(option: tuple[str, str]) -> None:
    refused = run("generate", PROMPT, "--verifier", "http://127.0.0.1:9", *option)
    assert refused.returncode == 2
    assert option[0].strip("-").replace("-", "_") in refused.stderr or "is not ID=BIAS" in refused.stderr


@pytest.mark.slow
def test_json_report(verifier: str) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "limit"), [(FIXED, 5000), ((*FIXED, "--no-http2"), 10_000), ((), 10_000)], ids=["2", "1.1", "planned"]
)
def test_a_hundred_tokens_take_few_kilobytes(verifier: str, options: tuple[str, ...], limit: int) -> None:
    """The limit is higher with the planner: on a busy machine it plans shorter rounds, which take more bytes."""
    arguments = ("--verifier", verifier, "--max-new-tokens", "100", "--ignore-eos", "--json")
    answer = run("generate", PROMPT, *arguments, *options)
    statistics = json.loads(answer.stdout)["statistics"]
    assert statistics["tokens"] == 100
    assert 500 < statistics["bytes_sent"] + statistics["bytes_received"] <= limit


@pytest.mark.slow
def test_memory_and_imports_of_the_board(verifier: str) -> None:
    """Peak resident memory is below 150 MB, and nothing that a board lacks is imported."""
    program = (
        "import re, sys\n"
        "from edge_runtime.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(code, peak, *sys.modules, file=sys.stderr)\n"
    )
    arguments = ["generate", PROMPT, "--verifier", verifier, "--max-new-tokens", "100", "--quiet"]
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    code, peak, *modules = result.stderr.split()
    assert code == "0"
    assert int(peak) * 1024 < 150 * MEGABYTE
    assert not [module for module in modules if module.startswith(FORBIDDEN)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", ""], 2, "the prompt is empty"),
        (["generate", "x", "--file", "/nowhere"], 2, "not both"),
        (["generate", "--file", "/nowhere"], 2, "cannot read the prompt"),
        (["generate", "x", "--temperature", "-1"], 2, "temperature must be"),
        (["generate", "x", "--top-p", "0"], 2, "top_p"),
        (["generate", "x", "--max-new-tokens", "0"], 2, "nothing to generate"),
        (["generate", "x", "--siblings", "1", "--policy", "ucb"], 2, "--siblings is part of a fixed plan"),
        (["generate", "x", "--objective", "cheap"], 2, "is not an objective: use one of latency"),
        (["generate", "x", "--profile", "toaster"], 2, "no shipped profile 'toaster': there are"),
        (["generate", "x", "--profile", "/nowhere.toml"], 2, "cannot read the profile /nowhere.toml"),
        (["generate", "x", "--energy-budget", "plenty"], 2, "is not an energy budget"),
        (["generate", "x", "--bundle", "/nowhere"], 2, "--bundle: there is no directory /nowhere"),
        (["generate", "x", "--bundle", "/"], 3, "no draft bundle at /"),
        (["generate", "x", "--verifier", "nonsense"], 2, "--verifier: 'nonsense' is not a URL"),
        (["generate", "x", "--verifier", "http://127.0.0.1:99999"], 2, "'http://127.0.0.1:99999' is not a URL"),
        (["generate", "x", "--deadline", "999999"], 2, "--deadline: must be a number above 0 and at most 3600"),
        (["generate", "x", "--verifier", "http://127.0.0.1:9", "--deadline", "0.3"], 4, "is it running"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.returncode == code
    assert result.stderr.startswith("edge-runtime: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "range_"),
    [
        ("--siblings", "-1", "a number of at least 0"),
        ("--assistant-confidence-threshold", "nan", "between 0 and 1"),
        ("--max-new-tokens", "-1", "a number of at least 0"),
    ],
)
def test_numbers_are_refused_outside_their_range(
    option: str, value: str, range_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "x", option, value])
    assert f"argument {option}: {value} is not {range_}" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_process() -> None:
    result = run_process("generate", "", input="")
    assert result.returncode == 2
    assert result.stderr.startswith("edge-runtime: the prompt is empty")


@pytest.fixture(scope="module")
def fixed_text(verifier: str) -> str:
    """What `generate` prints under a fixed plan."""
    options = ("--max-new-tokens", "48", "--ignore-eos", "--num-assistant-tokens", "3")
    return run_process("generate", PROMPT, "--verifier", verifier, *options).stdout


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["analytic", "hf-dynamic", "genai-ewma", "ucb"])
def test_every_policy_generates_the_same_text_and_explains_its_decisions(
    verifier: str, fixed_text: str, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    shared = ("generate", PROMPT, "--verifier", verifier, "--max-new-tokens", "48", "--ignore-eos")
    options = ("--policy", policy, "--objective", "balanced", "--profile", "raspberry-pi-5", "--radio", "wifi")
    # Restores the levels that --explain sets.
    with caplog.at_level("DEBUG", "edge_runtime.decoding"), caplog.at_level("DEBUG", "edge_runtime.planning"):
        answer = run(*shared, *options, "--energy-budget", "40000", "--explain")
    assert answer.stdout == fixed_text
    decisions = [message for message in caplog.messages if message.startswith("position ")]
    # Includes rounds that were sent early and then discarded.
    assert len(decisions) >= int(re.search(r"in (\d+) rounds", answer.stderr)[1])
    assert all(re.search(r"K=\d+ n=\d+, \S", line) for line in decisions)


@pytest.mark.slow
def test_options_override_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[verifier]\nurls = ["http://127.0.0.1:9"]\ndeadline_seconds = 0.3\n')
    configured = run("generate", "x", "--config", str(file))
    assert (configured.returncode, "no usable answer from http://127.0.0.1:9 within 0." in configured.stderr) == (
        4,
        True,
    )
    environ = {"FLEXSPEC_CONFIG": str(file)}
    overridden = run("generate", "x", "--verifier", "http://127.0.0.1:10", environ=environ)
    assert "no usable answer from http://127.0.0.1:10 within 0." in overridden.stderr
    file.write_text("[verifier]\nurl = 3\n")
    invalid = run("generate", "x", "--config", str(file))
    assert invalid.returncode == 2
    assert f"{file}:2:1: " in invalid.stderr


@pytest.mark.slow
def test_a_refusal_of_the_verifier_names_its_code(verifier: str) -> None:
    result = run("generate", "x", "--verifier", verifier, "--model", "gpt")
    assert result.returncode == 4
    assert "[unknown_model]" in result.stderr


@pytest.mark.slow
def test_a_closed_pipe_is_not_an_error(verifier: str) -> None:
    command = f"{sys.executable} -m edge_runtime.cli generate 'import os' --verifier {verifier} | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "command",
    [[], ["generate"], ["serve"], ["demo"], ["bundle", "install"], ["config", "show"], ["service", "install"]],
)
def test_help_imports_nothing_slow(command: list[str]) -> None:
    program = (
        "import sys\n"
        "from edge_runtime.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, *sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True, timeout=300, check=True
    )
    code, *modules = result.stderr.split()
    assert code == "0"
    assert not {"onnxruntime", "numpy", "httpx", "tokenizers", "rich", "tomlkit"} & set(modules)
    assert str(Path(__file__).resolve().parents[3]) not in result.stdout


def test_help_has_examples() -> None:
    assert "edge-runtime generate" in run("--help").stdout
    text = " ".join(run("generate", "--help").stdout.split())
    assert "--num-assistant-tokens" in text
    assert "else the bundle shipped with a source checkout" in text
    assert "--memory" not in text
