"""`cloud-verifier` on the base install: light commands work without torch, the others name the missing extra."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cloud_verifier.cli import main as cli
from cloud_verifier.cli import targets, token
from tests.cloud_verifier.protocol_client import TIMEOUT_SECONDS

# Runs the command line in an interpreter in which the packages of the extras cannot be imported.
PROGRAM = """
import sys

MISSING = set(sys.argv[1].split(","))

class MissingPackages:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, MissingPackages)
from cloud_verifier.cli.main import main
raise SystemExit(main(sys.argv[2:]))
"""
ALL_EXTRAS = "accelerate,peft,ray,safetensors,torch,transformers,uvloop"


def run_without(packages: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=TIMEOUT_SECONDS)


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "serve --help",
        "generate --help",
        "targets --help",
        "targets check --help",
        "token --help",
        "service --help",
        "token add board --tokens tokens.toml",
        "service install /srv/target --root root --python /usr/bin/python3",
    ],
)
def test_commands_that_need_no_extra(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    # A board's file system, of which the service needs an interpreter and the target.
    for directory in ("etc/systemd/system", "usr/bin", "srv/target"):
        (tmp_path / "root" / directory).mkdir(parents=True)
    (tmp_path / "root" / "usr" / "bin" / "python3").touch(0o755)
    result = run_without(ALL_EXTRAS, *arguments.split(), cwd=tmp_path)
    # `token add` prints the limits of the token.
    said = (
        result.stderr if not arguments.startswith("token add") else result.stderr.partition("the token of board has")[0]
    )
    assert (result.returncode, said) == (0, "")


@pytest.mark.slow
def test_tokens_and_listings_need_no_extra(tmp_path: Path) -> None:
    for arguments in ("add board", "list", "revoke board"):
        result = run_without(ALL_EXTRAS, "token", *arguments.split(), "--tokens", "tokens.toml", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    (tmp_path / "targets.toml").write_text("format_version = 1\n")
    result = run_without(ALL_EXTRAS, "targets", "list", "--registry", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        (ALL_EXTRAS, "serve target", "cloud"),
        ("torch", "serve target", "cloud"),
        (ALL_EXTRAS, "serve target --replicas 2", "scale"),
        ("ray", "serve target --replicas 2", "scale"),
        (ALL_EXTRAS, "generate target prompt", "cloud"),
        ("torch", "generate target prompt", "cloud"),
        (ALL_EXTRAS, "targets add target --registry registry", "cloud"),
        (ALL_EXTRAS, "targets check target --registry registry", "cloud"),
    ],
)
def test_a_missing_extra_is_named(missing: str, arguments: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "targets.toml").write_text("format_version = 1\n")
    result = run_without(missing, *arguments.split(), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith("cloud-verifier: this command needs the Python package ")
    assert sentence.endswith(f": pip install 'flexspec[{extra}]'")


def example_commands(description: str) -> list[list[str]]:
    """The `cloud-verifier` commands among the examples of a help text, as words."""
    lines = description.partition("examples")[2].replace("\\\n", "").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command[:1] == ["cloud-verifier"]]


@pytest.mark.slow
def test_the_examples_of_token_run_as_printed(tmp_path: Path) -> None:
    for _, *arguments in example_commands(token.DESCRIPTION):
        if arguments[0] == "token":
            result = run_without(ALL_EXTRAS, *arguments, cwd=tmp_path)
            assert (result.returncode, result.stderr.count("Traceback")) == (0, 0), result.stderr


@pytest.mark.slow
def test_the_examples_of_targets_run_as_printed(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where `draft-export example family` makes a link.
    (tmp_path / "family").symlink_to(family)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXSPEC_REGISTRY", "registry")
    for _, *arguments in example_commands(targets.DESCRIPTION):
        assert cli.main(arguments) == 0, (arguments, capsys.readouterr())
