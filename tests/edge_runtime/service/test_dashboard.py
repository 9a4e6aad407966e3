"""The dashboard in a real browser: what it shows, and what it must never do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from anyio.from_thread import start_blocking_portal

from cloud_verifier.model.target import Target
from edge_runtime.common import http_server
from edge_runtime.decoding import offline
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service import dashboard
from tests.edge_runtime.service.browser import Tab, chromium
from tests.edge_runtime.service.conftest import board_process, service_pair

PROMPT = "def read_config(path):\n"
NEWEST_TEXT = ".answer:first-child pre"
# The target continues what it reads, so that its own text is hostile as well.
# The toy target goes on like this.
HOSTILE = " ".join(["<img src=x>"] * 5)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Tab]:
    opened = Tab(browser, url)
    opened.wait_for_state("live")
    yield opened
    opened.close()


def tokens_by_kind(tab: Tab) -> dict[str, list[str]]:
    """Return the tokens of the newest answer by kind."""
    spans = tab.page.eval_on_selector_all(
        f"{NEWEST_TEXT} span", "spans => spans.map(s => [s.className, s.textContent])"
    )
    found: dict[str, list[str]] = {}
    for kind, text in spans:
        found.setdefault(kind, []).append(text)
    return found


@pytest.mark.slow
def test_an_answer_is_shown_as_colored_tokens_and_curves(tab: Tab, url: str, client: openai.OpenAI) -> None:
    status = tab.ask(PROMPT, temperature=0)
    expected = client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=32)
    assert f"{expected.usage.completion_tokens} tokens" in status
    tab.page.wait_for_selector(".answer:nth-child(2)")
    tab.page.wait_for_selector(".answer:first-child:not([data-writing])")
    tokens = tokens_by_kind(tab)
    assert tokens["prompt"] == [PROMPT]
    assert len(tokens["accepted"]) == expected.timings["draft_n_accepted"]
    assert len(tokens["corrected"]) + len(tokens.get("own", [])) == 32 - len(tokens["accepted"])
    assert tab.page.text_content(NEWEST_TEXT) == PROMPT + expected.choices[0].text
    # The kinds differ by more than color.
    styles = {
        kind: tab.page.eval_on_selector(
            f".legend .{kind}", "e => getComputedStyle(e).textDecoration + getComputedStyle(e).font"
        )
        for kind in ("accepted", "corrected", "own", "unverified", "withdrawn")
    }
    assert len(set(styles.values())) == 5
    assert int(tab.page.inner_text("#count-accepted")) >= len(tokens["accepted"])

    # Curves move, the chart of rounds has bars, and the numbers are those of the board.
    curve = '[data-gauge="rate"] .curve'
    tab.wait_until(f"(document.querySelector('{curve}').getAttribute('d') || '').split('L').length > 2")
    before = tab.page.get_attribute(curve, "d")
    tab.wait_until(f"document.querySelector('{curve}').getAttribute('d') !== '{before}'")
    for gauge in ("rate", "acceptance", "draft", "rtt", "bytes"):
        assert tab.page.is_visible(f'[data-gauge="{gauge}"]'), gauge
        assert tab.page.get_attribute(f'[data-gauge="{gauge}"] svg', "aria-label")
    assert tab.page.locator("#rounds rect").count() > 4
    assert (tab.page.inner_text("#plan-draft"), tab.page.inner_text("#plan-reason")) == ("5", "fixed")
    assert re.fullmatch(r"[\d.]+ [kM]?B", tab.page.inner_text("#sent"))
    assert "on this machine" in tab.page.inner_text("#privacy")
    assert tab.page.inner_text("#verifier").startswith("http://127.0.0.1:")

    assert tab.problems == []
    assert tab.requests
    assert all(requested.startswith(("data:", f"{url}/")) for requested in tab.requests), tab.requests


@pytest.mark.slow
def test_text_of_the_model_is_never_interpreted_as_html(tab: Tab) -> None:
    tab.ask(HOSTILE, temperature=0)
    shown = tab.page.text_content(NEWEST_TEXT).removeprefix(HOSTILE)
    assert "<img src=x>" in shown, "the target generated no HTML, so this tests nothing"
    assert tab.page.locator("main img, main script, main [onerror]").count() == 0
    assert tab.problems == []
    # Even if markup got into the page, it could not run.
    tab.page.evaluate("document.querySelector('#nothing').innerHTML = '<img src=x onerror=alert(1)>'")
    tab.page.wait_for_timeout(200)
    assert any("content security" in problem.lower() for problem in tab.problems)
    assert "1" not in tab.problems


@pytest.mark.slow
def test_speculation_can_be_switched_off_and_empty_prompts_are_not_sent(tab: Tab) -> None:
    tab.ask(PROMPT, speculation=False)
    assert not tokens_by_kind(tab).get("accepted")
    assert "switched speculation off" in tab.page.inner_text("#plan-reason")
    tab.page.fill("#prompt", "")
    tab.page.click("#go")
    assert tab.page.is_enabled("#go"), "an empty prompt is not sent"


@pytest.mark.slow
def test_the_page_opens_with_a_question_for_the_chat_template(tab: Tab, client: openai.OpenAI) -> None:
    assert tab.page.is_checked("#chat")
    question = tab.page.input_value("#prompt")
    status = tab.ask(question, temperature=0, chat=True)
    messages = [{"role": "user", "content": question}]
    expected = client.chat.completions.create(model="", messages=messages, temperature=0, max_tokens=32)
    assert f"{expected.usage.completion_tokens} tokens" in status
    shown = tokens_by_kind(tab)
    assert "User:" in "".join(shown["prompt"]), "the toy family has no template, so the plain form is used"
    assert tab.problems == []


def test_errors_of_the_service_are_shown(tab: Tab) -> None:
    tab.page.fill("#prompt", "x " * 5000)
    tab.page.click("#go")
    tab.wait_until("document.querySelector('#asked').textContent.includes('shorten it')")
    assert tab.page.is_enabled("#go")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (820, "light")])
def test_small_screens_do_not_scroll_sideways(browser: Any, url: str, width: int, scheme: str) -> None:
    tab = Tab(browser, url, width=width, height=800, scheme=scheme)
    tab.wait_for_state("live")
    tab.ask("x" * 200 + "\n" + PROMPT)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_sufficient_contrast(browser: Any, url: str, scheme: str) -> None:
    """WCAG's contrast ratio of 4.5 for all text on the page."""
    tab = Tab(browser, url, scheme=scheme)
    tab.wait_for_state("live")
    tab.ask(PROMPT)
    assert tab.page.evaluate(FIND_LOW_CONTRAST) == []
    # Every input has a label.
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length"
    assert tab.page.evaluate(unnamed) == 0
    tab.close()


FIND_LOW_CONTRAST = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const backgroundOf = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) return color;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || !element.checkVisibility() || element.disabled) continue;
    const [a, b] = [luminance(channels(getComputedStyle(element).color)), luminance(backgroundOf(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push([element.tagName, element.className, element.textContent.slice(0, 20), contrast]);
  }
  return found;
}"""


@pytest.mark.slow
def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(browser: Any, verifier: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (_, url):
        tab = Tab(browser, url)
        tab.wait_for_state("key")
        tab.page.fill("#key", "wrong")
        tab.page.press("#key", "Enter")
        tab.wait_for_state("key")
        tab.page.fill("#key", "first-key")
        tab.page.press("#key", "Enter")
        tab.wait_for_state("live")
        assert not tab.page.is_visible("#key-form")
        tab.ask(PROMPT)
        assert tab.page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        assert not any("first-key" in requested for requested in tab.requests)
        # Repetitive text does not end before the limit.
        tab.page.set_checked("#chat", False)
        tab.page.fill("#prompt", HOSTILE)
        tab.page.fill("#temperature", "0")
        tab.page.fill("#max-tokens", "1000")
        tab.page.press("#prompt", "Control+Enter")
        tab.page.click("#stop")
        tab.page.wait_for_selector("#go:enabled")
        assert tab.page.inner_text("#asked") == "stopped"
        tab.wait_until("document.querySelector('.answer:first-child h3').textContent.includes('cancelled')")
        tab.page.reload()
        tab.wait_for_state("live")
        # Chromium itself logs the two responses with status 401.
        assert all("401" in problem for problem in tab.problems)
        tab.close()


@pytest.mark.slow
def test_the_page_reconnects_to_a_restarted_service(browser: Any, verifier: str) -> None:
    options = ("--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (process, url):
        tab = Tab(browser, url)
        tab.wait_for_state("live")
        tab.ask(PROMPT, tokens=8)
        process.terminate()
        tab.wait_for_state("lost")
        port = url.rsplit(":", 1)[1]
        process.wait()
        with board_process(verifier, *options, "--port", port):
            tab.wait_for_state("live")
            # The new process numbers its answers from 1 again.
            tab.wait_until("document.querySelectorAll('.answer').length === 0")
            tab.ask(PROMPT, tokens=8)
            assert tab.page.locator(".answer").count() == 1
            tab.close()


@pytest.mark.slow
def test_unverified_tokens_are_marked_and_struck_through_when_withdrawn(
    browser: Any, target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.2)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(service_pair(target, draft, on_link_loss="draft")) as pair,
    ):
        tab = Tab(browser, pair.url)
        tab.wait_for_state("live")
        tab.page.uncheck("#chat")
        tab.page.fill("#prompt", PROMPT)
        tab.page.fill("#max-tokens", "200")
        tab.page.fill("#temperature", "0")
        tab.page.click("#go")
        tab.page.wait_for_selector(f"{NEWEST_TEXT} .accepted", state="attached")
        portal.call(pair.verifier.stop)
        tab.wait_until("document.querySelectorAll('#answers .unverified').length > 20")
        tab.page.wait_for_selector("#fault:visible")
        portal.call(pair.verifier.start)
        tab.page.wait_for_selector("#go:enabled")
        tab.wait_until("!document.querySelector('#answers .unverified, .answer[data-writing]')")
        tab.wait_until("document.querySelector('#fault').hidden")
        withdrawn = tab.page.locator(f"{NEWEST_TEXT} .withdrawn").count()
        verified = f"{NEWEST_TEXT} span:not(.prompt, .withdrawn)"
        text = "".join(tab.page.eval_on_selector_all(verified, "spans => spans.map(s => s.textContent)"))
        assert tab.page.inner_text("#count-withdrawn") == str(withdrawn)
        assert tab.problems == []
        tab.close()
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "speculation": False}
        answer = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=300).json()
        assert text == answer["choices"][0]["text"]
        assert withdrawn > 0


def test_files_are_served_with_a_strict_content_security_policy(url: str) -> None:
    for path, (name, media_type) in dashboard.PAGE_FILES.items():
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert answer.content == (dashboard.STATIC_DIRECTORY / name).read_bytes()
        assert answer.headers["content-type"].partition(";")[0] == media_type
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{url}/", headers={"host": "evil.example"}).status_code == 403
    for path in ("/static/index.html", "/dashboard.png", "/%2e%2e/app.py", "/index.html"):
        assert httpx.get(url + path).status_code == 404


def test_files_name_no_other_host_and_insert_no_html() -> None:
    for name, _ in dashboard.PAGE_FILES.values():
        text = (dashboard.STATIC_DIRECTORY / name).read_text()
        for address in re.findall(r"(?:https?:)?//[\w.]+\.\w+", text):
            assert address == "http://www.w3.org", f"{name}: {address}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
        assert not re.search(r"<style|\sstyle=|\son\w+=", text), name
