"""The chat of the page in a real browser: answers are those of the API, and what goes wrong is said where one looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from cloud_verifier.model.target import Target
from edge_runtime.decoding import offline
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.monitoring.words import load_words
from tests.edge_runtime.service.browser import Tab
from tests.edge_runtime.service.conftest import ServicePair, board_process, service_pair

WORDS = load_words()
# The toy target writes Python.
QUESTION, SECOND = "def read_config(path):", "class Connection:"
LAST = ".message:last-child"
TEXT = f"{LAST} > .text"
GREEDY = {"temperature": 0, "max_tokens": 24}

pytestmark = pytest.mark.slow


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    """An event loop in another thread, because Playwright's own API blocks this one."""
    with start_blocking_portal() as started:
        yield started


@pytest.fixture
def pair(
    portal: BlockingPortal, target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServicePair]:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    with portal.wrap_async_context_manager(service_pair(target, draft)) as started:
        yield started


def expected_answer(client: openai.OpenAI, messages: list[dict[str, str]], **options: Any) -> Any:
    return client.chat.completions.create(model="", messages=messages, **options)  # type: ignore[arg-type]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_answers_are_those_of_the_api_with_the_whole_conversation(tab: Tab, client: openai.OpenAI) -> None:
    first = tab.ask(QUESTION, **GREEDY, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, user(QUESTION)]
    expected = expected_answer(client, messages, temperature=0, max_tokens=24)
    assert first["content"] == expected.choices[0].message.content != ""
    assert first["version"] == expected.system_fingerprint
    assert first["version"] in tab.page.inner_text(f"{LAST} footer")
    assert tab.page.inner_text("#model") == first["version"]
    messages += [{"role": "assistant", "content": first["content"]}, user(SECOND)]
    second = tab.ask(SECOND)
    expected = expected_answer(client, messages, temperature=0, max_tokens=24)
    assert second["content"] == expected.choices[0].message.content
    # The announcement for screen readers.
    assert f"{expected.usage.completion_tokens} tokens" in tab.page.inner_text("#announcement")
    assert tab.problems == []


def test_text_is_colored_by_origin_and_counted(tab: Tab, client: openai.OpenAI) -> None:
    answer = tab.ask(QUESTION, **GREEDY)
    timings = expected_answer(client, [user(QUESTION)], temperature=0, max_tokens=24).timings
    counts = answer["counts"]
    assert counts["accepted"] == timings["draft_n_accepted"] > 0
    assert counts["corrected"] + counts["own"] == timings["predicted_n"] - counts["accepted"]
    assert counts["corrected"] > 0
    assert len(answer["kinds"]) == len(answer["content"])
    shown = tab.page.eval_on_selector_all(f"{TEXT} span", "spans => spans.map(s => s.className)")
    assert {"accepted", "corrected"} <= set(shown)
    footer = tab.page.inner_text(f"{LAST} footer")
    for kind in ("accepted", "corrected"):
        assert f"{counts[kind]} {WORDS.tokens[kind]}" in footer
    # The bar is to scale.
    parts = f"[...document.querySelectorAll('{LAST} .bar span')]"
    widths = tab.page.evaluate(f"{parts}.map(s => [s.className, s.offsetWidth])")
    total = sum(width for _, width in widths)
    for kind, width in widths:
        assert width / total == pytest.approx(counts[kind] / sum(counts.values()), abs=0.02)
    # Without the colors, the text looks as if it had no origins.
    style = "e => [getComputedStyle(e).color, getComputedStyle(e).textDecorationLine]"
    tab.page.uncheck("#colors")
    plain = tab.page.eval_on_selector(TEXT, style)
    assert tab.page.eval_on_selector(f"{TEXT} .accepted", style) == plain


def test_text_that_arrives_after_its_events_is_colored(tab: Tab) -> None:
    tab.set_settings(**GREEDY)

    def hold_back(route: Any) -> None:
        response = route.fetch()
        tab.wait_until("/complete|limit/.test(document.querySelector('.answer')?.textContent)")
        route.fulfill(response=response)

    tab.page.route("**/v1/chat/completions", hold_back)
    answer = tab.ask(QUESTION)
    assert len(answer["kinds"]) == len(answer["content"]) > 0
    assert set(answer["kinds"]) >= set("ac")


def test_chats_are_kept_in_the_browser(tab: Tab) -> None:
    answer = tab.ask(QUESTION, **GREEDY)
    colors = TEXT
    shown = tab.page.inner_html(colors)
    tab.page.reload()
    tab.wait_for_state("live")
    assert tab.page.inner_html(colors) == shown
    assert tab.page.inner_text(f"{LAST} footer code") == answer["version"]
    # The settings go on, too, and a new chat begins with them.
    tab.page.click("#new")
    assert tab.page.locator(".message").count() == 0
    assert tab.page.is_visible("#empty")
    assert tab.ask(SECOND)["content"] != answer["content"]
    tab.page.click("#open-chats")
    assert tab.page.locator("#chat-list li").count() == 2
    tab.page.click(f"#chat-list button:has-text('{QUESTION}')")
    assert tab.page.inner_html(colors) == shown
    tab.page.click("#open-chats")
    tab.page.click(f"#chat-list button[aria-label='Delete the chat {QUESTION}']")
    assert tab.page.locator("#chat-list li").count() == 1
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".message").count() == 0, "the deleted chat is not shown any more"
    # Nothing of it goes elsewhere.
    assert tab.page.evaluate("document.cookie") == ""


def test_a_browser_that_keeps_nothing_can_chat(tab: Tab) -> None:
    forbid = "Object.defineProperty(window, name, { get() { throw new DOMException('', 'SecurityError'); } })"
    tab.page.add_init_script(f"for (const name of ['localStorage', 'sessionStorage']) {forbid}")
    tab.page.reload()
    tab.wait_for_state("live")
    tab.set_settings(**GREEDY)
    tab.send(QUESTION)
    tab.wait_for_answer()
    assert tab.page.inner_text(TEXT)
    tab.page.click("#new")
    tab.page.click("#open-chats")
    tab.page.click(f"#chat-list button:has-text('{QUESTION}')")
    assert tab.page.locator(".message").count() == 2
    assert tab.problems == []


def test_regenerate_replaces_the_answer_and_edit_what_follows(tab: Tab, client: openai.OpenAI) -> None:
    seeds = {tab.ask(QUESTION, temperature=1, max_tokens=16)["seed"]}
    for _ in range(2):
        tab.page.click(f"{LAST} [data-action=again]")
        tab.wait_for_answer()
        assert tab.page.locator(".message").count() == 2
        answer = tab.chat()["messages"][-1]
        seeds.add(answer["seed"])
        expected = expected_answer(client, [user(QUESTION)], temperature=1, max_tokens=16, seed=answer["seed"])
        assert answer["content"] == expected.choices[0].message.content
    assert len(seeds) == 3
    tab.ask(SECOND)
    tab.page.click(".message:first-child [data-action=edit]")
    assert tab.page.input_value("#message") == QUESTION
    tab.send("import os")
    tab.wait_until("document.querySelectorAll('.message').length === 2")
    tab.wait_for_answer()
    messages = tab.chat()["messages"]
    assert messages[0]["content"] == "import os"
    expected = expected_answer(client, [user("import os")], temperature=1, max_tokens=16, seed=messages[1]["seed"])
    assert messages[1]["content"] == expected.choices[0].message.content


def test_stop_ends_the_answer_and_keeps_its_text(browser: Any, pair: ServicePair, portal: BlockingPortal) -> None:
    tab = Tab(browser, pair.url)
    tab.wait_for_state("live")
    tab.set_settings(temperature=0, max_tokens=1000)
    for stop in (lambda: tab.page.click("#stop"), lambda: tab.page.keyboard.press("Escape")):
        tab.page.click("#new")
        # Repetitive text does not end before the limit.
        tab.send("x = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1")
        tab.wait_until(f"document.querySelector('{TEXT}')?.textContent.length > 20")
        stop()
        tab.wait_for_answer()
        answer = tab.chat()["messages"][-1]
        assert answer["finish"] == "cancelled"
        assert len(answer["content"]) > 20
        assert WORDS.outcomes["cancelled"] in tab.page.inner_text(f"{LAST} footer")
        # The board stops, too, and the verifier's session is closed.
        tab.wait_until("document.querySelector('#chips').textContent.includes('no answer running')")
    assert portal.call(lambda: pair.verifier.sessions) == 0
    tab.close()


def test_a_wrong_key_is_said_in_the_page_and_kept_out_of_the_storage(
    browser: Any, verifier: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (_, url):
        tab = Tab(browser, url)
        tab.wait_for_state("key")
        # A message without a key: said in the chat, and answered by the button once there is one.
        tab.send(QUESTION)
        tab.page.wait_for_selector(f"{LAST} .error:visible")
        assert WORDS.remedies["invalid_api_key"] in tab.page.inner_text(f"{LAST} .error")
        tab.page.fill("#key", "wrong")
        tab.page.press("#key", "Enter")
        tab.wait_until("document.querySelector('#key-problem').textContent.includes('refused')")
        tab.page.fill("#key", "first-key")
        tab.page.press("#key", "Enter")
        tab.wait_for_state("live")
        assert not tab.page.is_visible("#key-form")
        tab.set_settings(**GREEDY)
        tab.page.click(f"{LAST} .error button")
        tab.wait_for_answer()
        assert tab.chat()["messages"][-1]["content"]
        assert tab.page.locator(f"{LAST} .error:visible").count() == 0
        assert "first-key" not in tab.page.evaluate("JSON.stringify(localStorage) + document.cookie")
        assert not any("first-key" in requested for requested in tab.requests)
        tab.page.reload()
        tab.wait_for_state("live")
        # Chromium itself logs the responses with status 401.
        assert all("401" in problem for problem in tab.problems)
        tab.close()


def test_a_lost_verifier_is_said_in_the_chat_until_it_is_back(
    browser: Any, pair: ServicePair, portal: BlockingPortal
) -> None:
    tab = Tab(browser, pair.url)
    tab.wait_for_state("live")
    expected = tab.ask(QUESTION, **GREEDY)["content"]
    portal.call(pair.verifier.stop)
    tab.page.click("#new")
    tab.set_settings(on_link_loss="wait")
    tab.send(QUESTION)
    tab.wait_until(f"document.querySelector('{LAST} .pending')?.textContent.startsWith('Waiting for the verifier')")
    assert tab.page.is_visible("#fault")
    portal.call(pair.verifier.start)
    tab.wait_for_answer()
    assert tab.chat()["messages"][-1]["content"] == expected
    tab.wait_until("document.querySelector('#fault').hidden")

    # A request that does not wait fails at once, and can be repeated.
    portal.call(pair.verifier.stop)
    tab.page.click("#new")
    failed = tab.ask(QUESTION, on_link_loss="fail")
    assert failed["content"] == ""
    error = tab.page.inner_text(f"{LAST} .error")
    assert pair.verifier.url in error
    assert WORDS.remedies["unreachable"] in error
    portal.call(pair.verifier.start)
    tab.page.click(f"{LAST} .error button")
    tab.wait_for_answer()
    assert tab.chat()["messages"][-1]["content"] == expected
    # A failed question is not part of the conversation.
    portal.call(pair.verifier.stop)
    tab.ask("lost")
    portal.call(pair.verifier.start)
    tab.ask(SECOND)
    sent = [json.loads(body) for body in tab.bodies][-1]
    assert [message["content"] for message in sent["messages"]] == [QUESTION, expected, SECOND]
    tab.close()


def test_an_answer_without_a_verifier_is_marked_and_counted(
    browser: Any, pair: ServicePair, portal: BlockingPortal
) -> None:
    tab = Tab(browser, pair.url)
    tab.wait_for_state("live")
    portal.call(pair.verifier.stop)
    answer = tab.ask(QUESTION, **GREEDY, on_link_loss="draft")
    assert answer["unverified"] > 0
    assert set(answer["kinds"]) == {"u"}
    assert f"{answer['unverified']} tokens" in tab.page.inner_text(f"{LAST} .warning")
    assert tab.page.locator(f"{TEXT} .unverified").count() > 0
    tab.wait_until("document.querySelector('#chips').textContent.includes('1 answer ended without verification')")
    assert tab.page.inner_text("#count-unverified") == str(answer["unverified"])
    portal.call(pair.verifier.start)
    tab.page.click(f"{LAST} [data-action=again]")
    tab.wait_for_answer()
    verified = tab.chat()["messages"][-1]
    assert verified["unverified"] == 0
    assert set(verified["kinds"]) <= set("aco")
    assert not tab.page.is_visible(f"{LAST} .warning")
    tab.close()


def test_too_long_a_conversation_says_what_to_do(tab: Tab) -> None:
    tab.ask("x " * 5000)
    error = tab.page.inner_text(f"{LAST} .error")
    assert WORDS.remedies["context_length_exceeded"] in error
    tab.page.click(f"{LAST} .error button")
    assert tab.page.locator(".message").count() == 0


def test_a_lost_board_is_said_in_the_chat(browser: Any, verifier: str) -> None:
    with board_process(verifier, "--policy", "fixed", "--threads", "1") as (process, url):
        tab = Tab(browser, url)
        tab.wait_for_state("live")
        process.terminate()
        tab.wait_for_state("lost")
        process.wait()
        tab.ask(QUESTION, **GREEDY)
        assert WORDS.remedies["lost"] in tab.page.inner_text(f"{LAST} .error")
        with board_process(verifier, "--policy", "fixed", "--threads", "1", "--port", url.rsplit(":", 1)[1]):
            tab.wait_for_state("live")
            tab.page.click(f"{LAST} .error button")
            tab.wait_for_answer()
            assert tab.chat()["messages"][-1]["content"]
        tab.close()


def test_structured_output(tab: Tab) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Alan"]}, "known": {"type": "boolean"}},
        "required": ["name", "known"],
        "additionalProperties": False,
    }
    tab.page.click("#open-settings")
    tab.page.fill("#s-schema", '{"type": ')
    tab.page.click('#settings-form button[type="submit"]')
    assert tab.page.is_visible("#schema-problem"), "what is no JSON is not saved"
    tab.page.click("#settings [data-close]")
    answer = tab.ask("Who was first?", **GREEDY, schema=json.dumps(schema))
    found = json.loads(answer["content"])
    assert found["name"] in ("Ada", "Alan")
    assert set(found) == {"name", "known"}
    # Shown as code, with the colors of its origins.
    assert json.loads(tab.page.inner_text(f"{LAST} .code pre")) == found
    assert "JSON schema" in tab.page.inner_text("#active")


def test_an_answer_can_be_copied(browser: Any, url: str) -> None:
    tab = Tab(browser, url, permissions=["clipboard-read", "clipboard-write"])
    tab.wait_for_state("live")
    answer = tab.ask(QUESTION, **GREEDY)
    tab.page.click(f"{LAST} [data-action=copy]")
    tab.wait_until("document.querySelector('#announcement').textContent === 'Copied'")
    assert tab.page.evaluate("navigator.clipboard.readText()") == answer["content"]
    # Over plain HTTP from another machine, browsers have no clipboard for pages.
    tab.page.evaluate("navigator.clipboard.writeText('')")
    tab.page.evaluate(
        "Object.defineProperty(navigator.clipboard, 'writeText', {value: () => Promise.reject(new Error())})"
    )
    tab.page.click(".message:first-child [data-action=copy]")
    tab.wait_until("document.querySelector('.message:first-child [data-action=copy]').textContent === 'Copied'")
    assert tab.page.evaluate("navigator.clipboard.readText()") == QUESTION
    tab.close()


def test_the_keyboard_does_everything(tab: Tab) -> None:
    page = tab.page
    page.focus("#message")
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    assert page.input_value("#message") == "line one\nline two"
    assert page.locator(".message").count() == 0
    page.keyboard.press("Enter")
    tab.wait_until("document.querySelectorAll('.message').length === 2")
    tab.wait_for_answer()
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.is_visible("#settings")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    # Every control can be reached, has a name, and shows that it has the focus.
    page.keyboard.press("Control+Home")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"open-chats", "new", "open-settings", "colors", "scroll", "message", "send", "Copy", "Regenerate", "Edit"}
    assert wanted <= reached, wanted - reached
    assert tab.problems == []


def test_html_of_the_model_is_never_interpreted(tab: Tab) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    schema = json.dumps({"type": "string", "enum": [hostile]})
    assert json.loads(tab.ask("What is the tag?", **GREEDY | {"max_tokens": 32}, schema=schema)["content"]) == hostile
    assert hostile in tab.page.inner_text(TEXT)
    assert tab.page.locator("main img, main script, main [onerror]").count() == 0
    assert tab.problems == []
    # Even if markup got into the page, it could not run.
    tab.page.evaluate("document.querySelector('#empty').innerHTML = '<img src=x onerror=alert(1)>'")
    tab.page.wait_for_timeout(200)
    assert any("content security" in problem.lower() for problem in tab.problems)
    assert "1" not in tab.problems


def test_answers_of_other_clients_are_in_the_live_view_only(tab: Tab, url: str) -> None:
    body = {"messages": [user(QUESTION)], "temperature": 0, "max_tokens": 8}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status()
    tab.wait_until("document.querySelector('.answer') !== null")
    assert tab.page.locator(".message").count() == 0
