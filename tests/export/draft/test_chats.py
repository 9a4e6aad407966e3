"""Self-written chats: whose turn is whose, what is random, and what a killed run keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from cloud_verifier.model.target import load_model
from edge_runtime.protocol.errors import InputError
from export.draft import chats
from export.draft.chats import ChatConfig, Chats, ChatWriter
from tests.models import CHAT_SPECIALS, save_chat_target

# Llama 2's form: one special token begins a turn of each side, and the user's text is in the middle of a line.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
UNKNOWN, START, END = CHAT_SPECIALS


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "CPU_ROWS", 3)
    monkeypatch.setattr(chats, "MAX_USER_TOKENS", 16)


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_target(tmp_path_factory.mktemp("chats") / "target", num_hidden_layers=1)


@pytest.fixture(scope="module")
def writer(target_path: Path) -> ChatWriter:
    return make_writer(target_path)


def make_writer(path: Path) -> ChatWriter:
    return ChatWriter(load_model(path, "cpu", torch.float32)[0], path)


def as_lists(written: Chats) -> list[tuple[list[int], int]]:
    assert written.lengths.sum() == len(written.ids)
    return written.rows()


@pytest.mark.slow
def test_turns_follow_the_template(writer: ChatWriter, target_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    rows = as_lists(writer.write(ChatConfig(6, 100, second_turns=0.0)))
    assert len(rows) == 6
    opened = 0
    for ids, start in rows:
        assert start < len(ids) <= 100
        prompt = tokenizer.decode(ids[:start])
        question = prompt.removeprefix(f"{START}user\n").removesuffix(f"{END}\n{START}assistant\n")
        assert question and len(prompt) == len(question) + len(f"{START}user\n{END}\n{START}assistant\n")
        assert not any(special in question for special in CHAT_SPECIALS)
        # The chat is what the template makes of it: the board will send the same ids.
        assert ids[:start] == writer.encode_prompt([{"role": "user", "content": question}])
        opened += question.startswith(chats.OPENINGS)
        # An answer stops at the end of its turn, or at the longest chat.
        assert tokenizer.eos_token_id not in ids[start:-1]
        assert ids[-1] == tokenizer.eos_token_id or len(ids) >= 60
    assert 0 < opened < 6


@pytest.mark.slow
def test_a_second_turn_continues_the_first(writer: ChatWriter, target_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    rows = as_lists(writer.write(ChatConfig(12, 150, second_turns=0.5)))
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    # Four batches of three rows, of which the second and the fourth have a second turn.
    assert [text.count(f"{START}user\n") for text in texts] == [1, 1, 1, 2, 2, 2] * 2
    for text, (ids, start) in zip(texts, rows, strict=True):
        assert text.count(f"{START}assistant\n") == text.count(f"{START}user\n")
        # The last answer is the judged one.
        assert tokenizer.decode(ids[start:]) == text.rpartition(f"{START}assistant\n")[2]
        assert len(ids) <= 150


@pytest.mark.slow
def test_greedy_answers_are_those_of_generate(writer: ChatWriter, target_path: Path) -> None:
    """Each alone and without padding."""
    model = load_model(target_path, "cpu", torch.float32)[0]
    for ids, start in as_lists(writer.write(ChatConfig(3, 150, temperatures=(0.0,), second_turns=1.0))):
        greedy = GenerationConfig(do_sample=False, max_new_tokens=len(ids) - start, eos_token_id=2, pad_token_id=2)
        assert model.generate(torch.tensor([ids[:start]]), generation_config=greedy)[0].tolist() == ids


@pytest.mark.slow
def test_temperatures_take_turns(writer: ChatWriter, target_path: Path) -> None:
    """At temperature 0 an answer is a function of its prompt; otherwise it also depends on the seed."""
    model = load_model(target_path, "cpu", torch.float32)[0]
    rows = as_lists(writer.write(ChatConfig(9, 80, temperatures=(1.0, 0.0), second_turns=0.0)))
    greedy = []
    for ids, start in rows:
        with torch.no_grad():
            choices = model(torch.tensor([ids])).logits[0, start - 1 : -1].argmax(-1).tolist()
        greedy.append(choices == ids[start:])
    assert greedy == [False, True] * 4 + [False]


@pytest.mark.slow
def test_chats_depend_on_the_seed_alone(writer: ChatWriter, target_path: Path) -> None:
    config = ChatConfig(4, 80)
    written = writer.write(config)
    torch.manual_seed(99)
    assert as_lists(make_writer(target_path).write(config)) == as_lists(written)
    assert as_lists(writer.write(ChatConfig(4, 80, seed=1))) != as_lists(written)
    # More chats begin with the same ones.
    assert as_lists(writer.write(ChatConfig(6, 80)))[:3] == as_lists(written)[:3]


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_batches(
    writer: ChatWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ChatConfig(8, 80)
    expected = as_lists(writer.write(config))
    write_batch = ChatWriter._write_batch
    batches = 0

    def fail_in_the_third(*arguments: object) -> Chats:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return write_batch(*arguments)

    monkeypatch.setattr(ChatWriter, "_write_batch", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        writer.write(config, tmp_path / "saved")
    assert len(list((tmp_path / "saved").iterdir())) == 2
    # Only the third batch is left to write.
    assert as_lists(writer.write(config, tmp_path / "saved")) == expected
    assert batches == 4
    assert as_lists(writer.write(config, tmp_path / "saved")) == expected
    assert batches == 4
    next((tmp_path / "saved").iterdir()).write_bytes(b"damaged")
    with pytest.raises(InputError, match="does not hold chats"):
        writer.write(config, tmp_path / "saved")


@pytest.mark.slow
def test_backwards_are_the_same_chats(writer: ChatWriter, tmp_path: Path) -> None:
    config = ChatConfig(7, 60, seed=5)
    forwards = writer.write(config, tmp_path / "forwards")
    backwards = writer.write(config, tmp_path / "backwards", backwards=True)
    assert as_lists(forwards) == as_lists(backwards)
    assert {path.name for path in (tmp_path / "backwards").iterdir()} == {
        path.name for path in (tmp_path / "forwards").iterdir()
    }


def test_saved_chats_are_equal(writer: ChatWriter, tmp_path: Path) -> None:
    written = writer.write(ChatConfig(4, 80))
    written.save(tmp_path / "new" / "chats.npz")
    assert as_lists(Chats.load(tmp_path / "new" / "chats.npz")) == as_lists(written)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["chats.npz"]
    joined = Chats.join([written, written])
    assert as_lists(joined) == 2 * as_lists(written)
    assert joined.ids.dtype == np.uint32


def test_questions_are_first_messages_of_users(writer: ChatWriter) -> None:
    questions = writer.write_questions(5, seed=3)
    assert questions == writer.write_questions(5, seed=3) != writer.write_questions(5, seed=4)
    for messages in questions:
        (message,) = messages
        assert message["role"] == "user" and message["content"] == message["content"].strip() != ""
        assert len(writer.encode_prompt(messages)) <= chats.MAX_QUESTION_TOKENS


@pytest.mark.slow
def test_another_template(tmp_path: Path) -> None:
    path = save_chat_target(tmp_path / "brackets", BRACKETS)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for ids, start in as_lists(make_writer(path).write(ChatConfig(3, 150, second_turns=1.0))):
        first, second = tokenizer.decode(ids[:start]).split(END)
        assert first.startswith(f"{START}[INST] ") and " [/INST] " in first
        assert second.startswith(f"{START}[INST] ") and second.endswith(" [/INST]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.role }}: hidden{% endfor %}", "drops the user's text"),
    ],
)
def test_templates_that_give_no_chats(template: str | None, message: str, tmp_path: Path) -> None:
    path = save_chat_target(tmp_path / "target", template)
    with pytest.raises(InputError, match=message):
        make_writer(path).write(ChatConfig(2, 60))
