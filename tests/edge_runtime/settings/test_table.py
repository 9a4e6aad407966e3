"""The settings table, and the options and documentation made from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest

from edge_runtime.cli import config, planner_options
from edge_runtime.cli.main import build_parser, main
from edge_runtime.cli.settings_options import add_config_option, add_settings, read_settings
from edge_runtime.common import logs
from edge_runtime.planning import factory
from edge_runtime.settings import loading
from edge_runtime.settings.table import SETTINGS, TABLES, LogLevel, PolicyName, Settings
from edge_runtime.settings.validators import convert

README = Path(__file__).resolve().parents[3] / "edge_runtime" / "README.md"


def parse(*arguments: str) -> argparse.Namespace:
    """Parse arguments with a parser that has the options of all settings."""
    parser = argparse.ArgumentParser()
    add_config_option(parser)
    add_settings(parser, *SETTINGS)
    return parser.parse_args(arguments)


def test_literals_equal_the_names_of_other_packages() -> None:
    assert get_args(PolicyName) == factory.POLICY_NAMES
    assert get_args(LogLevel) == logs.LEVELS
    assert SETTINGS["planner.policy"].default == factory.DEFAULT_POLICY
    planner_keys = {key for key in SETTINGS if key.startswith("planner.")}
    assert set(planner_options.PLANNER_KEYS) == planner_keys - {"planner.state_directory"}


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_declared_completely(key: str) -> None:
    entry = SETTINGS[key]
    spec = entry.spec
    assert spec.help
    assert not spec.help.endswith(".")
    assert spec.flag.startswith("--")
    assert entry.default
    if entry.value is not None:
        assert convert(entry.value, entry.type) == entry.value


def test_names_are_unique() -> None:
    names = [
        name
        for entry in SETTINGS.values()
        for name in (entry.variable, entry.spec.variable, entry.spec.credential, *entry.spec.mistaken_names)
        if name
    ]
    assert len(names) == len(set(names))
    assert not loading.REMOVED_KEYS.keys() & SETTINGS.keys()


def test_an_option_overrides_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[draft]\nthreads = 1\n[service]\nmax_waiting = 1\n[verifier]\nhttp2 = false\n")
    monkeypatch.setenv("FLEXSPEC_DRAFT__THREADS", "2")
    monkeypatch.setenv("FLEXSPEC_SERVICE__MAX_WAITING", "2")
    settings = read_settings(parse("--config", str(file), "--threads", "3"))
    assert settings.draft.threads == 3
    assert settings.service.max_waiting == 2
    assert not settings.verifier.http2
    assert settings.service.max_concurrent == Settings().service.max_concurrent


def test_options_set_values_of_every_type() -> None:
    options = ["--verifier", "https://a, https://b", "--deadline", "1.5", "--no-http2", "--insecure", "--radio", "wifi"]
    settings = Settings().replace(
        {key: value for key, value in vars(parse(*options, "--store", "dir")).items() if key in SETTINGS}
    )
    verifier = settings.verifier
    assert verifier.urls == ["https://a", "https://b"]
    assert (verifier.deadline_seconds, verifier.http2, verifier.insecure) == (1.5, False, True)
    assert (settings.planner.radio, settings.draft.store) == ("wifi", Path("dir"))


def test_an_option_that_is_not_given_changes_nothing() -> None:
    assert not [key for key in vars(parse()) if key in SETTINGS]


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
@pytest.mark.parametrize(
    "removed", [["--ngram-cache", "dir"], ["--no-ngram-cache"], ["--memory", "dir"], ["--no-memory"]]
)
def test_removed_options_do_nothing_but_warn(
    command: str, removed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "--threads", "2"]
    assert build_parser().parse_args([*arguments, *removed]) == build_parser().parse_args(arguments)
    reason = "the n-gram cache was removed; leave it out and delete its files"
    assert capsys.readouterr().err == f"edge-runtime: warning: {removed[0]} does nothing: {reason}\n"


def test_the_reference_lists_every_setting_and_is_part_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "reference"]) == 0
    reference = capsys.readouterr().out
    assert reference == config.markdown_reference() + "\n"
    for table in TABLES:
        assert f"### [{table}]\n" in reference
    for entry in SETTINGS.values():
        assert f"| `{entry.name}` |" in reference
        assert f"`{entry.variable}`" in reference
    assert reference in README.read_text()
