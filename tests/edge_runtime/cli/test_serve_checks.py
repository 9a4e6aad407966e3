"""`config check` and `serve` refuse the same configurations, with the same message."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_runtime.cli import config, draft_options
from edge_runtime.cli.main import build_parser, main
from edge_runtime.cli.serve_checks import check_installed
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import loading
from tests.conftest import FAMILY

pytestmark = pytest.mark.usefixtures("toy_bundle")

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with secrets, and an environment without settings."""
    (tmp_path / "token").write_text("secret")
    (tmp_path / "keys").write_text("# none yet\n")
    (tmp_path / "board.pem").write_text("not a certificate")
    (tmp_path / "empty").mkdir()
    for name in ("token", "keys"):
        (tmp_path / name).chmod(0o600)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("FLEXSPEC_BUNDLE", "")
    monkeypatch.setenv("FLEXSPEC_VERIFIER", "")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('verifier.urls = ["http://192.168.1.20:8500"]', 2, "or verifier.insecure = true in the configuration"),
        ('verifier = {urls = ["http://far.example"], insecure = true, token_file = "token"}', 2, "the token would be"),
        ('verifier.key_file = "token"', 2, "--client-certificate and --client-key go together"),
        ('verifier = {certificate_file = "board.pem", key_file = "token"}', 2, "cannot use the certificate"),
        ('draft.bundle = "empty"', 3, "no draft bundle at"),
        ("service.port = 65536", 2, "service.port: must be"),
        ("planner.profile = 'abacus'", 2, "no shipped profile 'abacus'"),
        ("[verifier\n", 2, "not TOML"),
    ],
)
def test_what_serve_refuses_the_check_refuses(
    text: str, code: int, message: str, folder: Path, capsys: Captured
) -> None:
    path = folder / "config.toml"
    path.write_text(text)
    said = []
    for command in (["config", "check", str(path)], ["serve", "--config", str(path)]):
        assert main(command) == code
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]
    assert message in said[0]


def test_the_services_file_is_checked_with_the_services_store(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY")
    (folder / "config.toml").touch()
    monkeypatch.setattr(loading, "SYSTEM_FILE", folder / "config.toml")
    monkeypatch.setattr(config, "SERVICE_STATE_DIRECTORY", str(folder / "service"))
    monkeypatch.setattr(draft_options, "EXAMPLE_FAMILY", folder / "nowhere")
    assert main(["config", "check", str(folder / "config.toml")]) == 0
    assert f"no draft bundle is installed in {folder}/service/bundles" in capsys.readouterr().out


def test_a_service_that_serve_would_refuse_is_not_installed(folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text('planner.policy = "ucb"\n')
    parse = build_parser().parse_args
    with pytest.raises(InputError, match="--siblings is part of a fixed plan"):
        check_installed(parse(["serve", "--config", str(config), "--siblings", "2"]))
    # The shell's environment is not the service's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXSPEC_PLANNER__POLICY", "ucb")
        config.write_text("")
        check_installed(parse(["serve", "--config", str(config), "--siblings", "2"]))


def test_what_the_check_accepts_has_a_bundle_or_says_that_none_is_installed(folder: Path, capsys: Captured) -> None:
    path = folder / "config.toml"
    path.write_text('verifier = {urls = ["http://192.168.1.20:8500"], insecure = true}')
    assert main(["config", "check", str(path)]) == 0
    assert f"{path}: no errors; `serve` accepts it\n" in capsys.readouterr().out
    shutil.copytree(FAMILY / "bundle", folder / "bundle")
    path.write_text('draft.bundle = "bundle"')
    assert main(["config", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no errors; `serve` accepts it\n"
    path.write_text('draft.bundle = "bundle"\nservice.max_concurrent = 64\n')
    (folder / "bundle/manifest.json").write_text("{}")
    assert main(["config", "check", str(path)]) == 3
