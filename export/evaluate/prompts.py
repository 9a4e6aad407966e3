"""Texts that evaluations and recordings start from: chats, and pieces of files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError
from export.data.held_out import encode_documents, load_held_out
from export.data.questions import EVERYDAY_QUESTIONS, HELD_OUT_CHATS

CHATS, EVERYDAY = "chats", "everyday"
# Prompts of chats, each of its own length; or the token ids of a long text, of which pieces are taken.
Prompts = list[list[int]]
# Messages in OpenAI's form.
Chat = list[dict[str, str]]


def load_prompts(
    tokenizer: Tokenizer, base: Path, files: Sequence[Path] = (), chat_files: Sequence[Path] = ()
) -> dict[str, Prompts | list[int]]:
    """Return texts by name: prompts of chats, and token ids of files.

    Without any file they are, if the target has a chat template, messages that the example family's target wrote and
    everyday questions, and in any case source code on which no member of the example family was trained.

    Args:
        base: directory of the target, or of its base, with the chat template.
        files: UTF-8 texts.
        chat_files: JSON lines, each with `messages` in OpenAI's form, the last by the user.

    Raises:
        InputError: a file cannot be used, or there are chats and no chat template.
    """
    texts: dict[str, Prompts | list[int]] = {}
    chats = {path.name: read_chats(path) for path in chat_files}
    template = _chat_template(base)
    if not files and not chat_files and template is not None:
        chats = with_everyday_questions(HELD_OUT_CHATS)
    if chats and template is None:
        raise InputError(f"{base} has no chat template, which chats need: give text with --text")
    texts |= {name: _encode_chats(tokenizer, template, several) for name, several in chats.items()}
    if files or not chat_files:
        for name, documents in load_held_out(files).items():
            texts[name] = [*chain.from_iterable(encode_documents(tokenizer, documents))]
    return texts


def load_chats(base: Path, path: Path) -> dict[str, Prompts]:
    """Return the prompts of a file of chats and of the everyday questions, for a target that has a chat template."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    template = _chat_template(base)
    return {name: _encode_chats(tokenizer, template, chats) for name, chats in with_everyday_questions(path).items()}


def with_everyday_questions(path: Path) -> dict[str, list[Chat]]:
    """Return the chats of a file and the everyday questions, by name."""
    return {CHATS: read_chats(path), EVERYDAY: [[{"role": "user", "content": text}] for text in EVERYDAY_QUESTIONS]}


def read_chats(path: Path) -> list[Chat]:
    """Read a file of chats. Raises InputError with the line that cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the chats {path}: {error}") from None
    chats = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
            chats.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'{path}, line {number}: write {{"messages": [{{"role": "user", "content": "..."}}]}}'
            ) from None
        if not chats[-1]:
            raise InputError(f"{path}, line {number}: the chat is empty")
    return chats


def _encode_chats(tokenizer: Tokenizer, template: Any, chats: list[Chat]) -> Prompts:
    rendered = [template.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [encoding.ids for encoding in tokenizer.encode_batch(rendered, add_special_tokens=False)]


def _chat_template(base: Path) -> Any:
    """The tokenizer of transformers, which renders the chat template; None if there is none."""
    from transformers import AutoTokenizer

    auto_tokenizer: Any = AutoTokenizer
    tokenizer = auto_tokenizer.from_pretrained(base, local_files_only=True)
    return tokenizer if tokenizer.chat_template else None
