"""Loading of settings: sources, their precedence, and errors with their lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.settings import loading, toml_positions
from edge_runtime.settings.loading import ConfigurationError, read_effective_settings, read_settings
from edge_runtime.settings.table import SETTINGS
from edge_runtime.settings.validators import read_secret
from tests.edge_runtime import commands

ALL_SETTINGS = """\
[draft]
bundle = "bundle"
store = "bundles"
public_key_file = "key.pub"
threads = 2
prefix_cache_mib = 16

[verifier]
urls = ["https://a.example/", "http://127.0.0.1:8500"]
model = "target-v2"
token_file = "token"
certificate_file = "token"
key_file = "token"
deadline_seconds = 7
proxy = "http://proxy.example:3128"
http2 = false
insecure = true

[planner]
policy = "ucb"
objective = "verifier=2,joule=0.05"
profile = "raspberry-pi-5"
radio = "5g"
energy_budget = "18:00"
state_directory = "planner"

[service]
host = "::1"
port = 0
max_concurrent = 3
max_waiting = 0
max_connections = 100
max_connections_per_address = 50
api_key_file = "token"
allowed_hosts = ["board.example"]
cors_origins = ["https://app.example"]
on_link_loss = "draft"
tool_call_form = "llama3"
reasoning_form = "none"

[log]
level = "debug"
prompts = true
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the files that `ALL_SETTINGS` names."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "token").write_text("s3cret\n")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "key.pub").write_text("a key")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def problems(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    """Return the errors, without the folder."""
    with pytest.raises(ConfigurationError) as raised:
        read_effective_settings(path, environ or {})
    assert raised.value.exit_code == 2
    lines = [str(problem) for problem in raised.value.problems]
    assert str(raised.value).splitlines()[1:] == [f"  {line}" for line in lines]
    return [line.removeprefix(f"{path.parent}/") for line in lines] if path else lines


def test_defaults_apply_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SYSTEM_FILE", Path("/nowhere"))
    effective = read_effective_settings(None, {"HOME": "/home/user"})
    assert effective.file is None
    assert effective.settings.draft.store == Path("/home/user/.local/state/flexspec/bundles")
    assert effective.settings.verifier.urls == ["http://127.0.0.1:8500"]
    assert {origin.kind for origin in effective.origins.values()} == {"default"}
    assert not effective.warnings


def test_a_file_can_set_everything_and_paths_are_relative_to_it(folder: Path) -> None:
    path = write(folder, ALL_SETTINGS)
    effective = read_effective_settings(path, {})
    settings = effective.settings
    assert (settings.draft.bundle, settings.draft.store) == (folder / "bundle", folder / "bundles")
    assert settings.verifier.urls == ["https://a.example", "http://127.0.0.1:8500"]
    assert settings.verifier.deadline_seconds == 7.0
    assert settings.verifier.token_file is not None
    assert read_secret(settings.verifier.token_file) == "s3cret"
    assert settings.planner.policy == "ucb"
    assert (settings.service.host, settings.service.port, settings.log.prompts) == ("::1", 0, True)
    defaults = {key for key, origin in effective.origins.items() if origin.kind == "default"}
    assert defaults == {"verifier.ca_file"}
    assert settings.verifier.certificate_file == settings.verifier.key_file == folder / "token"
    lines = ALL_SETTINGS.splitlines()
    for key, origin in effective.origins.items():
        if origin.kind == "file":
            assert lines[origin.line - 1].startswith(f"{SETTINGS[key].name} = ")
            assert str(origin) == f"{path}:{origin.line}:1"


def test_the_search_order_of_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_level(environ: dict[str, str], path: Path | None = None) -> str:
        return read_settings(path, environ).log.level

    system, home, xdg = folder / "system.toml", folder / "home", folder / "xdg"
    monkeypatch.setattr(loading, "SYSTEM_FILE", system)
    assert log_level({}) == "info"
    system.write_text("log.level = 'warning'")
    assert log_level({"HOME": str(home)}) == "warning"
    for directory, value in ((home / ".config", "error"), (xdg, "debug")):
        (directory / "flexspec").mkdir(parents=True)
        (directory / "flexspec" / "config.toml").write_text(f"log.level = '{value}'")
    assert log_level({"HOME": str(home)}) == "error"
    assert log_level({"HOME": str(home), "XDG_CONFIG_HOME": "relative"}) == "error"
    environ = {"HOME": str(home), "XDG_CONFIG_HOME": str(xdg)}
    assert log_level(environ) == "debug"
    environ["FLEXSPEC_CONFIG"] = str(system)
    assert log_level(environ) == "warning"
    assert log_level(environ, write(folder, "log.level = 'info'")) == "info"


def test_a_named_file_must_exist(folder: Path) -> None:
    message = "there is no such file; leave it out for defaults"
    assert problems(folder / "none.toml") == [f"none.toml: {message}"]
    assert problems(None, {"FLEXSPEC_CONFIG": "/nowhere.toml"}) == [f"/nowhere.toml: {message}"]
    assert problems(folder) == [f"{folder.name}: cannot be read: Is a directory"]


def test_the_environment_overrides_the_file(folder: Path) -> None:
    path = write(folder, ALL_SETTINGS)
    environ = {
        "FLEXSPEC_DRAFT__THREADS": "4",
        "FLEXSPEC_VERIFIER__HTTP2": "true",
        "FLEXSPEC_VERIFIER__DEADLINE_SECONDS": "1.5",
        "FLEXSPEC_VERIFIER": "https://b.example, http://localhost:1/base",
        "FLEXSPEC_BUNDLE": str(folder),
        "FLEXSPEC_PLANNER__ENERGY_BUDGET": "18000",
        "FLEXSPEC_PLANNER__POLICY": "",
        "FLEXSPEC_NO_SKIPS": "1",
    }
    effective = read_effective_settings(path, environ)
    settings = effective.settings
    assert (settings.draft.threads, settings.verifier.http2, settings.verifier.deadline_seconds) == (4, True, 1.5)
    assert settings.verifier.urls == ["https://b.example", "http://localhost:1/base"]
    assert settings.draft.bundle == folder
    assert (settings.planner.energy_budget, settings.planner.policy) == ("18000", "ucb")
    assert str(effective.origins["verifier.urls"]) == "$FLEXSPEC_VERIFIER"
    assert str(effective.origins["draft.threads"]) == "$FLEXSPEC_DRAFT__THREADS"
    environ["FLEXSPEC_VERIFIER__URLS"] = "http://127.0.0.1:7"
    assert read_settings(path, environ).verifier.urls == ["http://127.0.0.1:7"]


def test_a_named_file_overrides_a_credential(folder: Path) -> None:
    credentials = folder / "credentials"
    credentials.mkdir()
    (credentials / "verifier-token").write_text("passed")
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    effective = read_effective_settings(write(folder, ""), environ)
    assert effective.settings.verifier.token_file == credentials / "verifier-token"
    assert str(effective.origins["verifier.token_file"]) == "credential verifier-token"
    assert effective.settings.service.api_key_file is None
    named = read_settings(write(folder, "verifier.token_file = 'token'"), environ)
    assert named.verifier.token_file == folder / "token"


def test_all_errors_are_reported_at_once_with_line_and_remedy(folder: Path) -> None:
    path = write(
        folder,
        """\
dratf = 3
[draft]
thread = 2
bundle = "gone"
  store = 5
[verifier]
urls = []
http2 = "yes"
deadline_seconds = nan
ca_file = "token"
model = 2026-01-01
[planner]
policy = "analitic"
objective = "cheap"
profile = "toaster"
energy_budget = "plenty"
threads = 3
[service]
port = 70000
host = "my host"
max_concurrent = true
log.level = "info"
[log]
level = "loud"
""",
    )
    environ = {
        "FLEXSPEC_DRAFT__THREADS": "many",
        "FLEXSPEC_LGO__LEVEL": "info",
        "FLEXSPEC_PLANNER__POLCY": "ucb",
    }
    expected = [
        r'1:1: there is no table "dratf"; did you mean \[draft\]\?',
        r"3:1: draft.thread: there is no such field; did you mean threads\?",
        r"4:1: draft.bundle: there is no directory .*/gone; create it",
        r"5:3: draft.store: must be a path, in quotes, and is 5",
        r"7:1: verifier.urls: must be a list of at least one string, and is \[\]",
        r'8:1: verifier.http2: must be true or false, and is "yes"',
        r"9:1: verifier.deadline_seconds: must be a number above 0 and at most 3600, and is NaN",
        r"10:1: verifier.ca_file: .*/token holds no certificate",
        r'11:1: verifier.model: must be a string, in quotes, and is "2026-01-01"',
        r'13:1: planner.policy: must be one of "analytic", .*, and is "analitic"',
        r"14:1: planner.objective: 'cheap' is not an objective: use one of",
        r"15:1: planner.profile: no shipped profile 'toaster': there are",
        r"16:1: planner.energy_budget: 'plenty' is not an energy budget: give",
        r"17:1: planner.threads: belongs in \[draft\]",
        r"19:1: service.port: must be a whole number from 0 to 65535, and is 70000",
        r"20:1: service.host: 'my host' is neither an address nor a host name",
        r"21:1: service.max_concurrent: must be a whole number from 1 to 64, and is true",
        r"22:1: service.log: there is no such field; \[service\] has host, port",
        r'24:1: log.level: must be one of "debug", .*, and is "loud"',
        r'\$FLEXSPEC_LGO__LEVEL: there is no table "lgo"; did you mean \[log\]\?',
        r"\$FLEXSPEC_PLANNER__POLCY: planner.polcy: there is no such field; did you mean policy\?",
        r'\$FLEXSPEC_DRAFT__THREADS: draft.threads: must be a whole number from 0 to 256, and is "many"',
    ]
    found = problems(path, environ)
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(pattern if pattern.startswith(r"\$") else f"config.toml:{pattern}", line), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[draft]\nbundle = /opt\n", "config.toml:2:10: not TOML: Invalid value; correct it there"),
        ("[log]\n[log]\n", "config.toml:2:5: not TOML: Cannot declare"),
        ("log.level = 'info'\nlog.level = 'info'\n", "config.toml:2:19: not TOML: Cannot overwrite a value"),
        ("[verifier]\nurls = [", "config.toml:2:9: not TOML: "),
        ("[[log]]\n", "config.toml:1:1: log: must be a table; write [log], and its fields below"),
        ("\nlog = 3\n", "config.toml:2:1: log: must be a table"),
        ("x = " + "[" * 5000, "config.toml: not TOML: nested too deeply"),
        ("verifier.urls = ['ftp://a']", "config.toml:1:1: verifier.urls: 'ftp://a' is not a URL"),
        ("verifier.urls = ['http://a:x']", "config.toml:1:1: verifier.urls: 'http://a:x' is not a URL"),
        ("verifier.urls = ['http://a?b=c']", "config.toml:1:1: verifier.urls: 'http://a?b=c' has a query or fragment"),
        ("draft.store = '~nobody-at-all/x'", "config.toml:1:1: draft.store: ~nobody-at-all/x: there is no such user"),
        ("draft.public_key_file = '.'", "config.toml:1:1: draft.public_key_file: cannot read"),
        ("verifier.token_file = 'key.pub'", "config.toml:1:1: verifier.token_file: "),
    ],
)
def test_error_messages(folder: Path, text: str, message: str) -> None:
    found = problems(write(folder, text))
    assert len(found) == 1
    assert found[0].startswith(message)


def test_the_error_for_a_file_that_is_not_utf8_has_a_line(folder: Path) -> None:
    path = folder / "config.toml"
    path.write_bytes(b"[log]\nlevel = '\xff'\n")
    assert problems(path) == ["config.toml:2: is not UTF-8; save it as UTF-8"]


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("[verifier]\ntoken = 'hunter2'\n", {}),
        ("[draft]\ntoken = 'hunter2'\n", {}),
        ("token = 'hunter2'\n", {}),
        ("verifier.urls = ['https://me:hunter2@verifier.example']", {}),
        ("", {"FLEXSPEC_VERIFIER": "https://me:hunter2@verifier.example"}),
        ("", {"FLEXSPEC_VERIFIER__TOKEN": "hunter2"}),
        ("verifier.token_file = 'hunter2'", {}),
    ],
)
def test_secrets_are_refused_and_not_printed(folder: Path, text: str, environ: dict[str, str]) -> None:
    (problem,) = problems(write(folder, text), environ)
    assert "hunter2" not in problem
    assert "verifier.token_file" in problem


def test_the_error_for_an_api_key_names_its_file_and_credential(folder: Path) -> None:
    (problem,) = problems(write(folder, "[service]\napi-key = 'hunter2'\n"))
    assert "service.api_key_file" in problem
    assert "credential api-key" in problem


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", "é".encode(), b"x" * 20000])
def test_a_secret_is_one_line_of_ascii(folder: Path, content: bytes) -> None:
    (folder / "token").write_bytes(content)
    (problem,) = problems(write(folder, "verifier.token_file = 'token'"))
    assert "must hold the secret and nothing else" in problem


def test_risky_settings_are_logged_as_warnings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "token").chmod(0o644)
    text = "verifier.token_file = 'token'\nverifier.urls = ['http://far.example']\nservice.host = '0.0.0.0'\n"
    path = write(folder, text)
    read_settings(path, {})
    token, host = caplog.messages
    assert token == f"verifier.token_file: every user of this machine can read {folder}/token; run `chmod o-r` on it"
    assert "service.api_key_file" in host


def test_removed_keys_and_variables_do_nothing_but_warn(folder: Path) -> None:
    path = write(folder, "[draft]\nngram_cache = true\nmemory_directory = 'ngrams'\nthreads = 2\n")
    environ = {"FLEXSPEC_DRAFT__NGRAM_CACHE_DIRECTORY": "/srv/ngrams", "FLEXSPEC_DRAFT__MEMORY": ""}
    effective = read_effective_settings(path, environ)
    assert effective.settings == read_settings(write(folder, "[draft]\nthreads = 2\n"), {})
    reason = "does nothing: the n-gram cache was removed; leave it out and delete its files"
    assert effective.warnings == [
        f"{path}:2:1: draft.ngram_cache {reason}",
        f"{path}:3:1: draft.memory_directory {reason}",
        f"$FLEXSPEC_DRAFT__NGRAM_CACHE_DIRECTORY: draft.ngram_cache_directory {reason}",
    ]


# edge-runtime config


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `edge-runtime config`, with no settings in the environment but these."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("FLEXSPEC_")]:
            del os.environ[name]
        return commands.run("config", *arguments, environ=environ)


@pytest.mark.slow
def test_check_lists_errors_and_exits_with_2(folder: Path) -> None:
    path = write(folder, "[service]\nport = 8401\n")
    valid = run("check", str(path), STATE_DIRECTORY=str(folder))
    assert (valid.returncode, valid.stderr) == (0, "")
    assert valid.stdout.startswith(f"{path}: no errors; `serve` accepts it\n")
    invalid = run("check", str(path), FLEXSPEC_DRAFT__THREADS="-1", FLEXSPEC_LOG__LEVEL="loud")
    assert (invalid.returncode, invalid.stdout) == (2, "")
    assert invalid.stderr.startswith("edge-runtime: 2 errors in the configuration:\n  $FLEXSPEC_DRAFT__THREADS: ")


@pytest.mark.slow
def test_show_prints_equivalent_toml_with_origins(folder: Path) -> None:
    path = write(folder, ALL_SETTINGS)
    shown = run("show", FLEXSPEC_CONFIG=str(path), FLEXSPEC_LOG__LEVEL="error")
    assert re.search(rf"^threads = 2 +# {re.escape(str(path))}:5:1$", shown.stdout, re.MULTILINE)
    assert re.search(r'^level = "error" +# \$FLEXSPEC_LOG__LEVEL$', shown.stdout, re.MULTILINE)
    assert "# ca_file is not set" in shown.stdout
    assert "s3cret" not in shown.stdout
    again = write(folder, shown.stdout)
    assert read_settings(again, {}) == read_settings(path, {"FLEXSPEC_LOG__LEVEL": "error"})
    report = json.loads(run("show", str(path), "--json").stdout)
    assert report["file"] == str(path)
    token = report["values"]["verifier"]["token_file"]
    assert token["value"] == str(folder / "token")
    assert (token["origin"]["kind"], token["origin"]["line"]) == ("file", 13)


# TOML positions

KEYS = st.sampled_from(["a", "b", "draft", "two words", 'q"', "é"])
VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text("ab\"\n\\é'#=", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_every_key_is_at_its_position(document: dict[str, Any], multiline: bool) -> None:
    text = tomli_w.dumps(document, multiline_strings=multiline)
    parsed = toml_positions.parse(text)
    lines = text.split("\n")

    def walk(table: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, value in table.items():
            inner = (*path, key)
            if not isinstance(value, dict):
                assert inner in parsed.positions
            position = parsed.position(inner)
            assert lines[position.line - 1][position.column - 1 :].startswith(("[", key, '"'))
            if isinstance(value, dict):
                walk(value, inner)

    assert parsed.values == tomllib.loads(text)
    walk(parsed.values, ())


PIECES = [
    "[log]\n",
    "[draft]\n",
    "[[log]]\n",
    "level = 'info' # x\n",
    "log.level='x'\n",
    "\r\n",
    "  ",
    "=",
    '"',
    "{",
    "[",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=10).map("".join))
def test_any_text_parses_or_raises_a_toml_error(text: str) -> None:
    try:
        parsed = toml_positions.parse(text)
    except toml_positions.TomlError as error:
        assert error.position.line <= text.count("\n") + 1
    else:
        assert all(position.line <= text.count("\n") + 1 for position in parsed.positions.values())


@pytest.mark.slow
@given(
    st.dictionaries(
        st.sampled_from([entry.variable for entry in SETTINGS.values()]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12),
        max_size=3,
    )
)
def test_any_environment_loads_or_raises_a_configuration_error(environ: dict[str, str]) -> None:
    try:
        read_effective_settings(None, environ)
    except ConfigurationError as error:
        assert {problem.origin.name for problem in error.problems} <= environ.keys()
