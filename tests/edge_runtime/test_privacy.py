"""What leaves the board: nothing in clear that nobody allowed, and nothing that the README does not name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import calling, cli
from edge_runtime.configuration.settings import is_in_clear
from edge_runtime.contract.errors import InputError

FAR = "http://verifier.example"


@pytest.mark.parametrize(
    ("url", "clear"),
    [
        (FAR, True),
        ("HTTP://10.0.0.7:8500", True),
        ("http://127.0.0.1.example", True),
        ("http://[2001:db8::1]:8500", True),
        ("http://me@verifier.example", True),
        ("https://verifier.example", False),
        ("http://127.0.0.1:8500", False),
        ("http://[::1]:8500", False),
        ("http://localhost", False),
        ("nonsense", False),
        ("http://[::1", False),
    ],
)
def test_what_is_in_clear(url: str, clear: bool) -> None:
    assert is_in_clear(url) == clear


@pytest.mark.parametrize("command", [["generate", "x"], ["serve", "--port", "0"]])
def test_prompts_go_to_other_machines_in_clear_only_where_that_is_allowed(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--policy", "fixed", "--verifier", FAR]) == 2
    error = capsys.readouterr().err
    assert f"would go to {FAR} unencrypted" in error
    assert "--insecure" in error
    assert "https://" in error


def test_a_token_never_travels_in_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("secret")
    options = ["--policy", "fixed", "--token-file", str(tmp_path / "token"), "--insecure"]
    assert cli.main(["generate", "x", "--verifier", FAR, *options]) == 2
    assert f"the token would go to {FAR} unencrypted" in capsys.readouterr().err
    # One such URL among several is one too many.
    with pytest.raises(InputError, match="the token would go"):
        calling.check_private(["https://verifier.example", FAR], token=True, insecure=True)


def test_what_is_private_or_allowed_is_not_refused(tmp_path: Path) -> None:
    calling.check_private(["https://verifier.example", "http://127.0.0.1:8500"], token=True, insecure=False)
    calling.check_private([FAR], token=False, insecure=True)


def test_the_configuration_may_allow_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text(f"[verifier]\nurls = ['{FAR}']\ninsecure = true\ndeadline_seconds = 0.2\n")
    assert cli.main(["generate", "x", "--policy", "fixed", "--config", str(tmp_path / "config.toml")]) == 4
    assert "unencrypted" not in capsys.readouterr().err
