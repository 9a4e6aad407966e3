"""What evaluations start from: chats through the target's own template, and source code or files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cloud_verifier.registry.checkpoint import load_tokenizer
from edge_runtime.protocol.errors import InputError
from export.data import held_out
from export.data.corpus import DOMAINS, Domain, Source
from export.data.questions import EVERYDAY_QUESTIONS, HELD_OUT_CHATS
from export.evaluate.prompts import load_prompts, read_chats
from tests.models import save_chat_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_target(tmp_path_factory.mktemp("prompts") / "target")


def write_chats(path: Path, *chats: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def test_chats_are_rendered_as_transformers_renders_them(target: Path, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How are you?"},
    ]
    file = write_chats(tmp_path / "chats.jsonl", chat[:1], chat)
    prompts = load_prompts(load_tokenizer(target, target), target, chat_files=[file])
    tokenizer = AutoTokenizer.from_pretrained(target)
    expected = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        for messages in (chat[:1], chat)
    ]
    assert prompts == {"chats.jsonl": [list(getattr(ids, "input_ids", ids)) for ids in expected]}


def test_files_are_one_text_each(target: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    file = write_chats(tmp_path / "b.jsonl", [{"role": "user", "content": "Hi"}])
    tokenizer = load_tokenizer(target, target)
    prompts = load_prompts(tokenizer, target, [tmp_path / "a.txt"], [file])
    assert [*prompts] == ["b.jsonl", "a.txt"]
    assert prompts["a.txt"] == tokenizer.encode("some text").ids


def test_by_default_there_are_questions_and_source_code(
    target: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A small part of the source code.
    httpx = Source("httpx", "BSD-3-Clause", "BSD", ("httpx",))
    monkeypatch.setattr(held_out, "DOMAINS", [Domain(domain.name, (".py",), (httpx,)) for domain in DOMAINS])
    prompts = load_prompts(load_tokenizer(target, target), target)
    assert [*prompts] == ["chats", "everyday", "python", "cpp"]
    assert len(prompts["chats"]) == len(HELD_OUT_CHATS.read_text().splitlines())
    assert len(prompts["everyday"]) == len(EVERYDAY_QUESTIONS)
    # A target without a template gets the code alone.
    toy = family / "target-v1"
    assert [*load_prompts(load_tokenizer(toy, toy), toy)] == ["python", "cpp"]


def test_held_out_chats_are_first_messages_of_users() -> None:
    for messages in read_chats(HELD_OUT_CHATS):
        assert [message["role"] for message in messages] == ["user"]
        assert messages[0]["content"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2: write"),
        ('{"message": []}', "line 2: write"),
        ('{"messages": ["Hi"]}', "line 2: write"),
        ('{"messages": []}', "line 2: the chat is empty"),
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_chats(path)


def test_files_that_cannot_be_used_are_named(family: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the chats"):
        read_chats(tmp_path / "absent")
    file = write_chats(tmp_path / "chats.jsonl", [{"role": "user", "content": "Hi"}])
    toy = family / "target-v1"
    with pytest.raises(InputError, match="has no chat template, which chats need"):
        load_prompts(load_tokenizer(toy, toy), toy, chat_files=[file])
