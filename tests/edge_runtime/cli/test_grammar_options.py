"""--json-schema, --regex and --grammar of `edge-runtime generate` and `cloud-verifier generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from cloud_verifier.cli.main import main as cloud_main
from cloud_verifier.model.target import Target
from edge_runtime.cli.main import main
from tests.cloud_verifier.protocol_client import running
from tests.conftest import FAMILY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("toy_bundle")]

PROMPT = "def load(path):\n    return "
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"type": "integer", "maximum": 9999}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("kind", ["schema", "regex", "grammar"])
def test_both_commands_write_the_same_constrained_text(
    kind: str, target_v1: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "list.gbnf").write_text('root ::= "[" item ("," item)* "]"\nitem ::= [a-z]{1,8}\n')
    option = {
        "schema": ["--json-schema", str(tmp_path / "schema.json")],
        "regex": ["--regex", r"self\.[a-z]{3,9}\(\d\)"],
        "grammar": ["--grammar", str(tmp_path / "list.gbnf")],
    }[kind]
    options = [*option, "--max-new-tokens", "60", "--temperature", "0.8", "--seed", "6"]
    with running(target_v1) as url:
        assert main(["generate", PROMPT, "--verifier", url, "--policy", "fixed", "--quiet", *options]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert cloud_main(["generate", str(FAMILY / "target-v1"), PROMPT, *options]) == 0
    alone = capsys.readouterr().out
    assert alone.removeprefix(PROMPT).replace("<|endoftext|>", "").rstrip("\n") == text
    if kind == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert re.fullmatch(r"self\.[a-z]{3,9}\([0-9]\)" if kind == "regex" else r"\[[a-z]{1,8}(,[a-z]{1,8})*\]", text)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--json-schema", "{", "not a JSON schema"),
        ("--json-schema", None, "cannot read"),
        ("--grammar", "root = x", "neither Lark"),
        ("--grammar", "start: nowhere", "unknown name"),
        ("--json-schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
    ],
)
def test_an_unusable_file_is_an_error_that_says_why(
    option: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    assert main(["generate", PROMPT, option, str(file), "--policy", "fixed"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
