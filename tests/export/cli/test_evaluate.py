"""`draft-export evaluate` with the toy family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cloud_verifier.acceptance import measure
from edge_runtime.protocol.errors import BundleError, InputError
from export.cli.evaluate import JSON_FILE, OUTPUT_FILES
from export.cli.main import main
from tests.models import save_target

TEXT = str(Path(measure.__file__).with_name(measure.CALIBRATION_FILE))
SMALL = ["--text", TEXT, "--texts", "2", "--prompt", "8", "--tokens", "16", "--temperature", "0"]


@pytest.mark.slow
def test_a_bundle_with_two_versions(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "evaluation"
    arguments = ["evaluate", str(family / "bundle"), "--target", "target-v1", str(family / "target-v2"), *SMALL]
    arguments += ["--retrained", f"target-v2={family / 'draft-anchor'}", "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| bundle | target-v1 | 0 |" in printed and "| retrained | target-v2 | 0 |" in printed
    assert "| bundle | target-v2 | 0 |" in printed and "raspberry-pi-5, wifi, loaded" in printed
    assert sorted(path.name for path in output.iterdir()) == sorted(OUTPUT_FILES)
    record = json.loads((output / JSON_FILE).read_text())
    rows = {(row["draft"], row["version"]) for row in record["rows"]}
    assert len(rows) == 3 and all(row["positions"] <= 32 for row in record["rows"])
    # Existing output is not overwritten; the check comes before the measurement.
    assert main(arguments) == InputError.exit_code
    assert "exists already" in capsys.readouterr().err


def test_a_draft_directory_runs_in_pytorch(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(family / "draft-anchor"), "--target", "target-v2", *SMALL, "--ngram-cache"]) == 0
    captured = capsys.readouterr()
    assert "| draft-anchor | target-v2 | 0 |" in captured.out
    assert (
        "draft-export: --ngram-cache does nothing: the n-gram cache was removed; leave it out and delete its files\n"
        in captured.err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "target-v9"], "unknown target version 'target-v9'"),
        (["--target", "target-v1", "target-v1"], "two targets are named 'target-v1'"),
        (["--target", "target-v1", "--retrained", "target-v2=x"], "version 'target-v2' is not evaluated"),
        (["--target", "target-v1", "--retrained", "target-v1"], "write the version, =, and the draft's directory"),
        (["--target", "target-v1", "--retrained", "target-v1=x"], "no draft at x"),
        (["--target", "target-v1", "--tokens", "99999"], "give more text"),
        (["--target", "target-v1", "--text", "absent.txt"], "cannot read --text absent.txt"),
        (["--target", "target-v1", "--text", TEXT, TEXT], "two texts are named calibration.txt"),
        (["--target", "target-v1", "--profile", "toaster"], "no shipped profile 'toaster'"),
        (["--target", "target-v1", "--threads", "0"], "--threads 0"),
        (["--target", "target-v1", "--device", "abacus"], "--device abacus cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence(
    family: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", str(family / "bundle"), *SMALL, *arguments]) == InputError.exit_code
    assert message in capsys.readouterr().err


def test_different_tokenizers_are_an_error(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_target(tmp_path / "other")
    output = tmp_path / "evaluation"
    arguments = ["evaluate", str(family / "bundle"), "--target", str(target), *SMALL, "--output", str(output)]
    assert main(arguments) == InputError.exit_code
    assert "different tokenizers (2048 and 300 tokens" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [target]


def test_a_damaged_bundle_is_an_error(family: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(family / "bundle", tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"")
    target = str(family / "target-v1")
    assert main(["evaluate", str(bundle), "--target", target, *SMALL]) == BundleError.exit_code
    assert main(["evaluate", str(tmp_path), "--target", target, *SMALL]) == InputError.exit_code
