"""How a target is talked to, read from its files and written into bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.protocol.bundle import CHAT_FILE, ChatFormat, SamplingDefaults, read_bundle, read_chat_format
from edge_runtime.protocol.errors import InputError, TargetError
from export.bundle.chat_format import read_target_chat, write_chat_format

EXAMPLE_BUNDLE = Path(__file__).resolve().parents[3] / "export" / "example_family" / "bundle"


def write_generation_config(directory: Path, content: dict[str, Any]) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("content", "expected", "unsupported"),
    [
        ({}, SamplingDefaults(), []),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SamplingDefaults(0.6, None, 0.9), []),
        (
            {
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "min_p": 0.05,
                "repetition_penalty": 1.05,
                "typical_p": 0.5,
            },
            SamplingDefaults(0.7, 20, 0.8, 0.05, 1.05),
            ["typical_p"],
        ),
        ({"do_sample": False, "temperature": 0.6, "min_p": 0.5}, SamplingDefaults(0.0), []),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingDefaults(0.0, repetition_penalty=1.1), []),
        ({"do_sample": None, "temperature": None, "min_p": None}, SamplingDefaults(), []),
    ],
)
def test_sampling_defaults(
    tmp_path: Path, content: dict[str, Any], expected: SamplingDefaults, unsupported: list[str]
) -> None:
    chat = read_target_chat(write_generation_config(tmp_path, content))
    assert (chat.format.sampling, chat.unsupported) == (expected, unsupported)


@pytest.mark.parametrize("content", [{"temperature": -1}, {"top_p": 0}, {"top_k": "many"}, {"temperature": 1e-9}])
def test_defaults_that_no_request_may_have_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"generation_config.json: .*; correct"):
        read_target_chat(write_generation_config(tmp_path, content))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TargetError, match=r"tokenizer_config\.json"):
        read_target_chat(tmp_path)


def test_a_template_that_does_not_parse_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError, match=r"'default' of .* does not parse"):
        read_target_chat(tmp_path)


def test_a_target_that_says_nothing_adds_no_file(tmp_path: Path) -> None:
    write_chat_format(ChatFormat(special_tokens={"bos_token": "<s>"}), tmp_path)
    assert not list(tmp_path.iterdir())
    write_chat_format(ChatFormat(sampling=SamplingDefaults(temperature=0.5)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHAT_FILE]


def test_the_example_bundle_has_the_template_of_its_model() -> None:
    chat = read_chat_format(read_bundle(EXAMPLE_BUNDLE))
    assert "You are a helpful AI assistant named SmolLM" in chat.templates["default"]
    assert chat.special_tokens["eos_token"] == "<|im_end|>"
