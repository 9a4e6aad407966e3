"""Chat templates render as in transformers, from a target's files through a bundle; without one the form is plain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from edge_runtime.protocol.bundle import CHAT_FILE, ChatFormat
from edge_runtime.protocol.errors import BundleCorrupt, InputError
from edge_runtime.service.chat_template import PLAIN_STOPS, ChatOptions, ChatTemplate, load_chat_template
from export.bundle.chat_format import read_target_chat
from tests.conftest import FAMILY
from tests.edge_runtime.service.conftest import BUNDLE, write_chat_bundle

# Templates of released models; the file's name has the model's and, after a dot, the template's.
TEMPLATES = Path(__file__).with_name("chat_templates")
DEFAULT_FILES = sorted(path for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith((".tool_use", ".rag")))
MODELS = [path.stem for path in DEFAULT_FILES]
TOKENS: dict[str, Any] = {
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "special": True},
    "eos_token": "</s>",
    "pad_token": None,
    "additional_special_tokens": ["<|a|>", {"__type": "AddedToken", "content": "<|b|>"}],
    "extra_special_tokens": {"image_token": "<image>"},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather for a place, e.g. <São Paulo> & 'Łódź'.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "The place"},
                "days": {"type": "integer", "description": "How many days"},
            },
            "required": ["place"],
        },
    },
}
USER = {"role": "user", "content": "  What is\n\na 'draft'? größer <b>  "}
TURNS = [USER, {"role": "assistant", "content": "A guess. \n"}, {"role": "user", "content": "And then?"}]
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Łódź", "days": 2}},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "turns": TURNS,
    "system": [{"role": "system", "content": "Be <brief>."}, *TURNS],
    "tool": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"celsius": 7}', "tool_call_id": "abcdef123", "name": "get_weather"},
    ],
    "rejected": [*TURNS, {"role": "user", "content": "Twice"}],
}
OPTIONS = {
    "plain": ChatOptions(),
    "no prompt": ChatOptions(add_generation_prompt=False),
    "tools": ChatOptions(tools=[WEATHER, WEATHER]),
    "documents": ChatOptions(documents=[{"title": "A", "text": "Alpha"}, {"title": "B", "text": "Beta"}]),
    "variables": ChatOptions(variables={"enable_thinking": False, "tools_in_user_message": False, "date_string": "x"}),
}


def make_target(directory: Path, config: dict[str, Any]) -> Path:
    """Write the tokenizer files of a target."""
    directory.mkdir(exist_ok=True)
    shutil.copy(FAMILY / "target-v1" / "tokenizer.json", directory)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load_both(directory: Path, target: Path) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    """Return the template that a bundle of `target` has on a board, and the tokenizer in transformers."""
    chat = read_target_chat(target).format
    return load_chat_template(write_chat_bundle(directory, chat)), PreTrainedTokenizerFast.from_pretrained(target)


def outcome(render: Any) -> str:
    try:
        return f"text: {render()}"
    except Exception as error:
        return f"error: {str(error).removeprefix('the chat template rejects this conversation: ')}"


def reference(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], options: ChatOptions) -> str:
    text: str = tokenizer.apply_chat_template(
        messages,
        tools=options.tools,
        documents=options.documents,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message,
        tokenize=False,
        **options.variables,
    )
    return text


@pytest.mark.parametrize("model", MODELS)
def test_templates_of_models_render_as_in_transformers(tmp_path: Path, model: str) -> None:
    named = {path.stem.removeprefix(model)[1:] or "default": path for path in TEMPLATES.glob(f"{model}*.jinja")}
    sources = [{"name": name, "template": path.read_text()} for name, path in sorted(named.items())]
    template = sources if len(sources) > 1 else sources[0]["template"]
    ours, theirs = load_both(tmp_path, make_target(tmp_path / "target", {**TOKENS, "chat_template": template}))
    rendered = 0
    for messages in CONVERSATIONS.values():
        for options in OPTIONS.values():
            expected = outcome(lambda m=messages, o=options: reference(theirs, m, o))
            assert outcome(lambda m=messages, o=options: ours.render(m, o)) == expected
            rendered += expected.startswith("text: ")
    assert rendered >= 5
    assert ours.stop_strings == []
    assert not ours.is_plain


@pytest.mark.parametrize("model", ["qwen2.5", "gemma-2", "phi-3", "mistral-v3", "smollm2"])
@pytest.mark.parametrize("ending", ["The answer", "The answer is ", ""])
def test_a_message_is_continued_as_in_transformers(tmp_path: Path, model: str, ending: str) -> None:
    template = (TEMPLATES / f"{model}.jinja").read_text()
    ours, theirs = load_both(tmp_path, make_target(tmp_path / "target", {**TOKENS, "chat_template": template}))
    messages = [USER, {"role": "assistant", "content": ending}]
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert ours.render(messages, options) == reference(theirs, messages, options)
    assert messages[-1]["content"] == ending
    with pytest.raises(InputError, match="add_generation_prompt: false"):
        ours.render(messages, ChatOptions(continue_final_message=True))


FIRST, SECOND = "{{ bos_token }}first{{ eos_token }}", "{{ bos_token }}second"


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({}, {**TOKENS, "chat_template": FIRST}),
        ({}, {"chat_template": [{"name": "tool_use", "template": SECOND}, {"name": "default", "template": FIRST}]}),
        ({"chat_template.jinja": FIRST}, {**TOKENS, "chat_template": SECOND}),
        ({"chat_template.jinja": FIRST, "additional_chat_templates/tool_use.jinja": SECOND}, TOKENS),
        (
            {"special_tokens_map.json": json.dumps({"bos_token": {"content": "<B>"}, "eos_token": "<E>"})},
            {"bos_token": "<s>", "chat_template": FIRST},
        ),
        (
            {"special_tokens_map.json": json.dumps({"bos_token": {"content": "<B>"}, "eos_token": "<E>"})},
            {"bos_token": "<s>", "chat_template": FIRST, "added_tokens_decoder": {}},
        ),
    ],
)
def test_templates_and_tokens_are_read_from_the_files_that_transformers_reads(
    tmp_path: Path, files: dict[str, str], config: dict[str, Any]
) -> None:
    target = make_target(tmp_path / "target", config)
    for name, text in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)
    ours, theirs = load_both(tmp_path, target)
    for options in (OPTIONS["plain"], OPTIONS["tools"]):
        assert ours.render([USER], options) == reference(theirs, [USER], options)


def test_a_processor_file_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", {})
    (target / "chat_template.json").write_text(json.dumps({"chat_template": FIRST}))
    assert read_target_chat(target).format.templates == {"default": FIRST}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages.nothing.at.all }}", "no attribute"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_may_reject_a_conversation(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(ChatFormat({"default": source}), Path("bundle")).render([USER])


@pytest.mark.parametrize("chat", [ChatFormat({"default": "{% if %}"}), b"not JSON", b"[1]", b'{"templates": 1}'])
def test_a_template_that_does_not_parse_fails_at_load(tmp_path: Path, chat: ChatFormat | bytes) -> None:
    with pytest.raises(BundleCorrupt, match="again"):
        load_chat_template(write_chat_bundle(tmp_path, chat))


def test_a_file_that_the_manifest_does_not_record_is_ignored(tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    (tmp_path / "bundle" / CHAT_FILE).write_text('{"templates": {"default": "planted"}}')
    assert load_chat_template(tmp_path / "bundle").is_plain


# Without a template


def test_an_older_bundle_has_the_plain_form() -> None:
    chat = load_chat_template(BUNDLE)
    text = chat.render([{"role": "system", "content": "Be <brief>."}, USER])
    assert text == f"System: Be <brief>.\n\nUser: {USER['content']}\n\nAssistant:"
    assert (chat.is_plain, chat.stop_strings) == (True, PLAIN_STOPS)


def test_the_plain_form_continues_a_message() -> None:
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    assert load_chat_template(BUNDLE).render(messages, options) == "User: Hi\n\nAssistant: Hel"


@pytest.mark.parametrize("unsupported", [OPTIONS["tools"], OPTIONS["documents"]])
def test_the_plain_form_takes_no_tools(unsupported: ChatOptions) -> None:
    with pytest.raises(InputError, match="neither tools nor documents"):
        load_chat_template(BUNDLE).render([USER], unsupported)
    with pytest.raises(InputError, match="role 'tool'"):
        load_chat_template(BUNDLE).render(CONVERSATIONS["tool"])


@pytest.mark.parametrize(("form", "expected"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0])])
def test_the_plain_form_begins_as_the_tokenizer_begins_a_text(form: str, expected: list[int]) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLE / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(form, special_tokens=[("<s>", 0), ("</s>", 1)])
    chat = load_chat_template(BUNDLE)
    text = chat.render([USER])
    assert chat.encode(tokenizer, text) == expected + tokenizer.encode(text, add_special_tokens=False).ids
    # A template writes its own special tokens.
    templated = ChatTemplate(ChatFormat({"default": "<|endoftext|>x"}), BUNDLE)
    assert templated.encode(tokenizer, templated.render([USER]))[:1] == [0]
    assert templated.encode(tokenizer, templated.render([USER])).count(0) == 1
