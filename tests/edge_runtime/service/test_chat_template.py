"""Chat templates render as in transformers; without one there is a plain format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from edge_runtime.protocol.errors import BundleCorrupt, InputError
from edge_runtime.service.chat_template import PLAIN_STOPS, load_chat_template
from tests.conftest import FAMILY
from tests.edge_runtime.service.conftest import write_bundle

CONVERSATION = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "What is\n\na 'draft'?  "},
    {"role": "assistant", "content": "A guess."},
    {"role": "user", "content": "größer"},
]
CHATML = """\
{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
STRICT = """\
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system here') }}{%- endif -%}
{%- for m in messages -%}{{ m | tojson }}{{ eos_token }}{%- endfor -%}
"""


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FAMILY / "target-v1")


@pytest.mark.parametrize("template", [CHATML, STRICT])
def test_templates_render_as_in_transformers(tmp_path: Path, reference: PreTrainedTokenizerFast, template: str) -> None:
    config = (FAMILY / "target-v1" / "tokenizer_config.json").read_text()
    chat = load_chat_template(write_bundle(tmp_path, template=template, config=config))
    conversation = CONVERSATION[1:]
    expected = reference.apply_chat_template(
        conversation, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert chat.render(conversation) == expected
    assert chat.stop_strings == []


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": CHATML, "bos_token": "<s>"},
        {"chat_template": CHATML, "bos_token": {"content": "<s>", "lstrip": False}},
        {
            "chat_template": [{"name": "rag"}, {"name": "default", "template": CHATML}],
            "bos_token": "<s>",
        },
    ],
)
def test_the_template_is_read_from_the_tokenizer_configuration(tmp_path: Path, config: object) -> None:
    chat = load_chat_template(write_bundle(tmp_path, config=json.dumps(config)))
    assert chat.render(CONVERSATION[3:]) == "<s><|im_start|>user\ngrößer<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_file_takes_precedence(tmp_path: Path) -> None:
    chat = load_chat_template(write_bundle(tmp_path, template="file", config='{"chat_template": "configuration"}'))
    assert chat.render(CONVERSATION) == "file"


@pytest.mark.parametrize("config", [None, "{}", '{"chat_template": [{"name": "rag", "template": "x"}]}'])
def test_without_a_template_the_format_is_plain(tmp_path: Path, config: str | None) -> None:
    chat = load_chat_template(write_bundle(tmp_path, config=config) if config else tmp_path)
    assert chat.render(CONVERSATION[:2]) == "System: Be <brief>.\n\nUser: What is\n\na 'draft'?  \n\nAssistant:"
    assert chat.stop_strings == PLAIN_STOPS


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, "no system here"),
        ("{{ messages.nothing.at.all }}", "no attribute"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_may_reject_a_conversation(tmp_path: Path, template: str, message: str) -> None:
    chat = load_chat_template(write_bundle(tmp_path, template=template))
    with pytest.raises(InputError, match=message):
        chat.render(CONVERSATION)


@pytest.mark.parametrize(
    "files",
    [{"template": "{% if %}"}, {"config": "not JSON"}, {"config": '{"chat_template": "{{"}'}, {"config": "[1]"}],
)
def test_a_template_that_does_not_parse_fails_at_load(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(BundleCorrupt, match="copy the bundle again"):
        load_chat_template(write_bundle(tmp_path, **files))
