"""The command `cloud-verifier targets`."""

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
from tests.cloud_verifier.protocol_client import TIMEOUT_SECONDS, command_service, running_service
from tests.cloud_verifier.target_versions import save_incompatible_version
from tests.models import save_target


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXSPEC_REGISTRY", str(tmp_path / "registry"))
    return tmp_path / "registry"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run `cloud-verifier targets` with these words; returns exit code, output and errors."""
    code = main(["targets", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_rollout_from_the_first_version_to_the_last(
    registry: Path, family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, _ = run(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    assert (code, output.splitlines()[1][:10]) == (0, "target-v1@")
    assert "100 % of new sessions of latest" in output
    assert "it gets no sessions yet" in run(capsys, "add", family / "target-v2")[1]
    assert ", 5 % target-v2@" in run(capsys, "canary", "target-v2", 5)[1]
    assert run(capsys, "promote", "target-v2")[1].startswith("latest: target-v2@")
    assert run(capsys, "promote", "target-v1", "--alias", "stable")[1].startswith("stable: target-v1@")
    assert run(capsys, "rollback")[1].startswith("latest: target-v1@")
    assert ", 5 %" not in run(capsys, "rollback", "latest")[1]
    code, output, _ = run(capsys, "list", "--json")
    listed = json.loads(output)
    assert (code, listed["default"], listed["drafts"]) == (0, "latest", [str(family / "bundle")])
    assert {target["version"][:9]: target["aliases"] for target in listed["targets"]} == {
        "target-v1": {"latest": 100.0, "stable": 100.0},
        "target-v2": {},
    }
    code, output, _ = run(capsys, "list")
    assert len(output.splitlines()) == 4
    assert "100 % of latest, 100 % of stable" in output
    assert "retired" in run(capsys, "retire", "target-v2")[1]
    code, _, error = run(capsys, "promote", "target-v2")
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
def test_errors_are_one_sentence_and_an_exit_code(
    registry: Path, words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    actual_code, _, error = run(capsys, *words)
    assert (actual_code, sentence in error) == (code, True)
    assert len(error.splitlines()) == 1
    assert not registry.exists() or words[0] == "add"


def test_an_incompatible_version_is_refused_with_its_tensor(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_incompatible_version(family / "target-v1", tmp_path / "target-v5", str(family / "target-v1"))
    run(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    code, _, error = run(capsys, "add", tmp_path / "target-v5")
    assert code == 3
    assert "tensor model.norm.weight: it has other values" in error
    assert "admitted" not in run(capsys, "list")[1].splitlines()[1]
    assert "unshared" in run(capsys, "add", tmp_path / "target-v5", "--unshared")[1]
    assert run(capsys, "promote", "target-v5")[0] == 2
    assert run(capsys, "promote", "target-v5", "--unshared")[0] == 0


def test_adding_a_draft_warns_about_incompatible_versions(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "add", save_target(tmp_path / "tiny"))
    code, _, error = run(capsys, "add", "--draft", family / "bundle")
    assert code == 0
    assert all("warning: tiny@" in line for line in error.splitlines())


def write_text(path: Path) -> Path:
    """Write a text of some 1,600 tokens that no model was trained on: the first lines of this file, with numbers."""
    lines = Path(__file__).read_text().splitlines()[:90]
    path.write_text("\n".join(f"{line}  # {index * 7919 % 1000}" for index, line in enumerate(lines)))
    return path


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:  # type: ignore[type-arg]
    code, output, _ = run(capsys, "check", *words, "--json", "--threads", 1)
    return code, json.loads(output)


@pytest.mark.slow
def test_a_check_compares_with_the_version_in_use_and_its_exit_code_decides(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.py")
    run(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    code, checked = check(capsys, family / "target-v2", "--text", text, "--tolerance", 50)
    assert (code, checked["compatible"]) == (0, True)
    (forecast,) = checked["expected"]
    assert [version.partition("@")[0] for version in forecast["versions"]] == ["target-v2", "target-v1"]
    assert forecast["positions"] == 128 * forecast["passages"] >= 1000
    for expected in forecast["expectations"]:
        checked_version, in_use = (Interval(**interval) for interval in expected["of"])
        change = Interval(**expected["change"])
        assert 0.2 < checked_version.low < checked_version.value < checked_version.high < 0.95
        assert abs(checked_version.value - in_use.value - change.value) < 1e-4
        # The versions are compared on the same positions, so the change is known more precisely than each rate.
        assert change.high - change.low < (checked_version.high - checked_version.low) + (in_use.high - in_use.low)
    worst = max(-100 * expected["change"]["value"] for expected in forecast["expectations"])
    assert check(capsys, family / "target-v2", "--text", text, "--tolerance", worst - 0.01)[0] == 1


@pytest.mark.slow
def test_a_check_of_the_version_in_use_prints_a_table(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.py")
    run(capsys, "add", family / "target-v1")
    code, output, _ = run(
        capsys, "check", "target-v1", "--draft", family / "bundle", "--text", text, "--tolerance", 0, "--threads", 1
    )
    assert code == 0
    assert "compatible with 1 deployed draft" in output
    assert [line.split()[0] for line in output.splitlines()[-2:]] == ["T=0", "T=1"]


@pytest.mark.slow
def test_a_check_of_an_incompatible_version_reports_differences_and_forecasts(
    registry: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_incompatible_version(family / "target-v1", tmp_path / "target-v5", str(family / "target-v1"))
    run(capsys, "add", family / "target-v1", "--draft", family / "bundle")
    code, checked = check(capsys, tmp_path / "target-v5", "--text", write_text(tmp_path / "text.py"))
    assert (code, checked["compatible"]) == (3, False)
    assert checked["gate"]["fits"][0]["differences"][0]["name"] == "model.norm.weight"
    assert len(checked["expected"]) == 1
    code, checked = check(capsys, save_target(tmp_path / "tiny"))
    assert (code, checked["expected"]) == (3, [])


@pytest.mark.parametrize(("text", "sentence"), [("", "at least 1536"), (None, "cannot read --text")])
def test_a_text_that_is_too_short_or_missing(
    registry: Path, family: Path, tmp_path: Path, text: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "text").write_text(text)
    run(capsys, "add", family / "target-v1")
    code, _, error = run(capsys, "check", "target-v1", "--draft", family / "bundle", "--text", tmp_path / "text")
    assert (code, sentence in error) == (2, True)


@pytest.mark.slow
def test_serving_a_registry(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "add", save_target(tmp_path / "tiny"))
    with running_service(command_service("--registry", registry)) as url:

        def listed() -> list[str]:
            return [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]

        run(capsys, "promote", "tiny", "--alias", "stable")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while listed() != ["latest", "stable", "tiny"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_serve_reports_unusable_registries(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: Path
) -> None:
    def serve(*words: object) -> tuple[int, str]:
        return main(["serve", "--port", "0", *map(str, words)]), capsys.readouterr().err

    for words in ((), (family / "target-v1", "--registry", registry)):
        code, error = serve(*words)
        assert (code, "give a TARGET" in error) == (2, True)
    code, error = serve("--registry", registry)
    assert (code, "no registry of targets" in error) == (3, True)
    run(capsys, "add", save_target(tmp_path / "tiny"))
    (tmp_path / "tiny" / "model.safetensors").unlink()
    code, error = serve("--registry", registry)
    assert (code, "no safetensors weights" in error) == (3, True)
    save_target(tmp_path / "tiny", seed=1)
    code, error = serve("--registry", registry)
    assert (code, "have changed since it was added" in error) == (3, True)


def test_a_list_needs_no_torch(registry: Path, family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "add", family / "target-v1")
    program = (
        "import sys; from cloud_verifier.cli.main import main; "
        "code = main(['targets', 'list']); sys.exit(code or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
