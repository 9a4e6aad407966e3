"""`cloud-verifier targets`, as an operator types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from cloud_verifier.acceptance.bootstrap import Interval
from cloud_verifier.cli.main import main
from export.example_family.evolution import break_contract
from tests.models import save_target


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXSPEC_REGISTRY", str(tmp_path / "registry"))
    return tmp_path / "registry"


def say(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `cloud-verifier targets` and these words."""
    code = main(["targets", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_roll_out_from_the_first_version_to_the_last(
    registry: Path, family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = say(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    assert (code, told.splitlines()[1][:10]) == (0, "target-v1@")
    assert "100 % of new sessions of latest" in told
    assert "it gets no sessions yet" in say(capsys, "add", family / "target-v2")[1]
    assert ", 5 % target-v2@" in say(capsys, "canary", "target-v2", 5)[1]
    assert say(capsys, "promote", "target-v2")[1].startswith("latest: target-v2@")
    assert say(capsys, "promote", "target-v1", "--alias", "stable")[1].startswith("stable: target-v1@")
    assert say(capsys, "rollback")[1].startswith("latest: target-v1@")
    assert ", 5 %" not in say(capsys, "rollback", "latest")[1]
    code, told, _ = say(capsys, "list", "--json")
    listed = json.loads(told)
    assert (code, listed["default"], listed["drafts"]) == (0, "latest", [str(family / "bundle")])
    assert {one["version"][:9]: one["aliases"] for one in listed["targets"]} == {
        "target-v1": {"latest": 100.0, "stable": 100.0},
        "target-v2": {},
    }
    code, told, _ = say(capsys, "list")
    assert len(told.splitlines()) == 4
    assert "100 % of latest, 100 % of stable" in told
    assert "retired" in say(capsys, "retire", "target-v2")[1]
    code, _, error = say(capsys, "promote", "target-v2")
    assert (code, "no active version" in error) == (2, True)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["list"], 3, "no registry of targets"),
        (["add"], 2, "give a VERSION"),
        (["add", "target-v9"], 2, "looked in"),
        (["add", "/"], 3, "config.json"),
        (["add", "--draft", "/"], 3, "no draft bundle"),
        (["promote", "x"], 3, "no registry of targets"),
        (["check", "x"], 3, "no registry of targets"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_an_exit_code(
    registry: Path, words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done, _, error = say(capsys, *words)
    assert (done, sentence in error) == (code, True)
    assert len(error.splitlines()) == 1
    assert not registry.exists() or words[0] == "add"


def test_a_version_outside_the_contract_is_refused_with_its_tensor(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_contract(family / "target-v1", tmp_path / "target-v5", str(family / "target-v1"))
    say(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    code, _, error = say(capsys, "add", tmp_path / "target-v5")
    assert code == 3
    assert "tensor model.norm.weight: it has other values" in error
    assert "admitted" not in say(capsys, "list")[1].splitlines()[1]
    assert "unshared" in say(capsys, "add", tmp_path / "target-v5", "--unshared")[1]
    assert say(capsys, "promote", "target-v5")[0] == 2
    assert say(capsys, "promote", "target-v5", "--unshared")[0] == 0


def test_a_draft_that_fits_nobody_who_is_served_is_a_warning(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(capsys, "add", save_target(tmp_path / "tiny"))
    code, _, error = say(capsys, "add", "--draft", family / "bundle")
    assert code == 0
    assert all("warning: tiny@" in line for line in error.splitlines())


def write_text(path: Path) -> Path:
    """A text of some 1,600 tokens, which nobody was trained on: this very file's first lines, and numbers."""
    lines = Path(__file__).read_text().splitlines()[:90]
    path.write_text("\n".join(f"{line}  # {index * 7919 % 1000}" for index, line in enumerate(lines)))
    return path


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:  # type: ignore[type-arg]
    code, told, _ = say(capsys, "check", *words, "--json", "--threads", 1)
    return code, json.loads(told)


def test_a_check_measures_beside_the_version_in_use_and_its_exit_code_decides(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.py")
    say(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    code, checked = check(capsys, family / "target-v2", "--text", text, "--tolerance", 50)
    assert (code, checked["compatible"]) == (0, True)
    (forecast,) = checked["expected"]
    assert [version.partition("@")[0] for version in forecast["versions"]] == ["target-v2", "target-v1"]
    assert forecast["positions"] == 128 * forecast["passages"] >= 1000
    for expected in forecast["expectations"]:
        mine, other = (Interval(**interval) for interval in expected["of"])
        change = Interval(**expected["change"])
        assert 0.2 < mine.low < mine.value < mine.high < 0.95
        assert abs(mine.value - other.value - change.value) < 1e-4
        # The same positions: the difference is known better than two figures apart would be.
        assert change.high - change.low < (mine.high - mine.low) + (other.high - other.low)
    worst = max(-100 * expected["change"]["value"] for expected in forecast["expectations"])
    assert check(capsys, family / "target-v2", "--text", text, "--tolerance", worst - 0.01)[0] == 1


def test_the_version_in_use_has_nothing_to_lose_and_a_table_is_printed(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.py")
    say(capsys, "add", family / "target-v1")
    code, told, _ = say(
        capsys, "check", "target-v1", "--draft", family / "bundle", "--text", text, "--tolerance", 0, "--threads", 1
    )
    assert code == 0
    assert "compatible with 1 deployed draft" in told
    assert [line.split()[0] for line in told.splitlines()[-2:]] == ["T=0", "T=1"]


def test_a_check_of_what_does_not_fit_says_both(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_contract(family / "target-v1", tmp_path / "target-v5", str(family / "target-v1"))
    say(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    code, checked = check(capsys, tmp_path / "target-v5", "--text", write_text(tmp_path / "text.py"))
    assert (code, checked["compatible"]) == (3, False)
    assert checked["gate"]["fits"][0]["differences"][0]["name"] == "model.norm.weight"
    assert len(checked["expected"]) == 1
    code, checked = check(capsys, save_target(tmp_path / "tiny"))
    assert (code, checked["expected"]) == (3, [])


@pytest.mark.parametrize(("text", "sentence"), [("", "at least 1536"), (None, "cannot read --text")])
def test_a_text_that_is_too_short_or_not_there(
    registry: Path, family: Path, tmp_path: Path, text: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "text").write_text(text)
    say(capsys, "add", family / "target-v1")
    code, _, error = say(capsys, "check", "target-v1", "--draft", family / "bundle", "--text", tmp_path / "text")
    assert (code, sentence in error) == (2, True)


def test_serving_a_registry(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(capsys, "add", save_target(tmp_path / "tiny"))
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", "--registry", str(registry), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline().split()
        try:
            assert told[1].startswith("tiny@")
            say(capsys, "promote", "tiny", "--alias", "stable")
            end = time.monotonic() + 30
            while [model["id"] for model in httpx.get(f"{told[-1]}/v1/models").json()["data"]] != [
                "latest",
                "stable",
                "tiny",
            ]:
                assert time.monotonic() < end
                time.sleep(0.1)
        finally:
            process.terminate()
        assert process.wait(30) == 0


def test_what_cannot_be_served(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: Path
) -> None:
    def serve(*words: object) -> tuple[int, str]:
        return main(["serve", "--port", "0", *map(str, words)]), capsys.readouterr().err

    for words in ((), (family / "target-v1", "--registry", registry)):
        code, error = serve(*words)
        assert (code, "give a TARGET" in error) == (2, True)
    code, error = serve("--registry", registry)
    assert (code, "no registry of targets" in error) == (3, True)
    say(capsys, "add", save_target(tmp_path / "tiny"))
    (tmp_path / "tiny" / "model.safetensors").unlink()
    code, error = serve("--registry", registry)
    assert (code, "no safetensors weights" in error) == (3, True)
    save_target(tmp_path / "tiny", seed=1)
    code, error = serve("--registry", registry)
    assert (code, "have changed since it was added" in error) == (3, True)


def test_a_list_needs_no_torch(registry: Path, family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(capsys, "add", family / "target-v1")
    program = (
        "import sys; from cloud_verifier.cli.main import main; "
        "code = main(['targets', 'list']); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
