"""The dashboard in a real browser: what people see, and what the page must never do."""

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
from tests.edge_runtime.service.conftest import board_process, both

PROMPT = "def read_config(path):\n"
SHOWN = ".answer:first-child pre"
# The target goes on with what it sees: its own words are hostile, too.
HOSTILE = "<img src=x onerror=alert(1)>\n" * 6 + "<img"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Tab]:
    opened = Tab(browser, url)
    opened.state("live")
    yield opened
    opened.close()


def kinds(tab: Tab) -> dict[str, list[str]]:
    """The newest answer's tokens by kind."""
    spans = tab.page.eval_on_selector_all(f"{SHOWN} span", "spans => spans.map(s => [s.className, s.textContent])")
    found: dict[str, list[str]] = {}
    for kind, text in spans:
        found.setdefault(kind, []).append(text)
    return found


def test_a_prompt_becomes_coloured_tokens_and_curves(tab: Tab, url: str, client: openai.OpenAI) -> None:
    said = tab.ask(PROMPT, temperature=0)
    expected = client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=32)
    assert f"{expected.usage.completion_tokens} tokens" in said
    tab.page.wait_for_selector(".answer:nth-child(2)")
    tab.page.wait_for_selector(".answer:first-child:not([data-writing])")
    tokens = kinds(tab)
    assert tokens["prompt"] == [PROMPT]
    assert len(tokens["accepted"]) == expected.timings["draft_n_accepted"]
    assert len(tokens["corrected"]) + len(tokens.get("own", [])) == 32 - len(tokens["accepted"])
    assert tab.page.text_content(SHOWN) == PROMPT + expected.choices[0].text
    # Colour is not all that tells them apart.
    looks = {
        kind: tab.page.eval_on_selector(
            f".legend .{kind}", "e => getComputedStyle(e).textDecoration + getComputedStyle(e).font"
        )
        for kind in ("accepted", "corrected", "own", "unverified", "withdrawn")
    }
    assert len(set(looks.values())) == 5
    assert int(tab.page.inner_text("#count-accepted")) >= len(tokens["accepted"])

    # Curves move, bars stand, and numbers are those of the board.
    curve = '[data-gauge="rate"] .curve'
    tab.until(f"(document.querySelector('{curve}').getAttribute('d') || '').split('L').length > 2")
    before = tab.page.get_attribute(curve, "d")
    tab.until(f"document.querySelector('{curve}').getAttribute('d') !== '{before}'")
    for gauge in ("rate", "acceptance", "draft", "rtt", "bytes"):
        assert tab.page.is_visible(f'[data-gauge="{gauge}"]'), gauge
        assert tab.page.get_attribute(f'[data-gauge="{gauge}"] svg', "aria-label")
    assert tab.page.locator("#rounds rect").count() > 4
    assert (tab.page.inner_text("#plan-draft"), tab.page.inner_text("#plan-reason")) == ("5", "fixed")
    assert re.fullmatch(r"[\d.]+ [kM]?B", tab.page.inner_text("#sent"))
    assert "on this machine" in tab.page.inner_text("#privacy")
    assert tab.page.inner_text("#verifier").startswith("http://127.0.0.1:")

    assert tab.complaints == []
    assert tab.requests
    assert all(asked.startswith(("data:", f"{url}/")) for asked in tab.requests), tab.requests


def test_what_the_model_writes_is_text_and_nothing_else(tab: Tab) -> None:
    tab.ask(HOSTILE, temperature=0)
    shown = tab.page.text_content(SHOWN).removeprefix(HOSTILE)
    assert "<img src=x onerror=alert(1)>" in shown, "the target has not written any HTML: this tests nothing"
    assert tab.page.locator("main img, main script, main [onerror]").count() == 0
    assert tab.complaints == []
    # Were it ever let in, it could not run.
    tab.page.evaluate("document.querySelector('#nothing').innerHTML = '<img src=x onerror=alert(1)>'")
    tab.page.wait_for_timeout(200)
    assert any("Content Security Policy" in said or "content security" in said.lower() for said in tab.complaints)
    assert "1" not in tab.complaints


def test_speculation_off_and_nothing_to_ask(tab: Tab) -> None:
    tab.ask(PROMPT, speculation=False)
    assert not kinds(tab).get("accepted")
    assert "switched speculation off" in tab.page.inner_text("#plan-reason")
    tab.page.fill("#prompt", "")
    tab.page.click("#go")
    assert tab.page.is_enabled("#go"), "an empty prompt is not sent"


def test_what_the_board_refuses_is_said(tab: Tab) -> None:
    tab.page.fill("#prompt", "x " * 5000)
    tab.page.click("#go")
    tab.until("document.querySelector('#asked').textContent.includes('shorten it')")
    assert tab.page.is_enabled("#go")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (820, "light")])
def test_small_screens_do_not_scroll_sideways(browser: Any, url: str, width: int, scheme: str) -> None:
    tab = Tab(browser, url, width=width, height=800, scheme=scheme)
    tab.state("live")
    tab.ask("x" * 200 + "\n" + PROMPT)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Any, url: str, scheme: str) -> None:
    """WCAG's contrast of 4.5, for every kind of text on the page."""
    tab = Tab(browser, url, scheme=scheme)
    tab.state("live")
    tab.ask(PROMPT)
    assert tab.page.evaluate(CONTRASTS) == []
    # Whatever takes an input has a name.
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length"
    assert tab.page.evaluate(unnamed) == 0
    tab.close()


CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = channels(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || !element.checkVisibility() || element.disabled) continue;
    const [a, b] = [luminance(channels(getComputedStyle(element).color)), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) faint.push([element.tagName, element.className, element.textContent.slice(0, 20), contrast]);
  }
  return faint;
}"""


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Any, verifier: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (_, url):
        tab = Tab(browser, url)
        tab.state("key")
        tab.page.fill("#key", "wrong")
        tab.page.press("#key", "Enter")
        tab.state("key")
        tab.page.fill("#key", "first-key")
        tab.page.press("#key", "Enter")
        tab.state("live")
        assert not tab.page.is_visible("#key-form")
        tab.ask(PROMPT)
        assert tab.page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        assert not any("first-key" in asked for asked in tab.requests)
        # A text that repeats itself has no end of its own.
        tab.page.fill("#prompt", HOSTILE)
        tab.page.fill("#temperature", "0")
        tab.page.fill("#max-tokens", "1000")
        tab.page.press("#prompt", "Control+Enter")
        tab.page.click("#stop")
        tab.page.wait_for_selector("#go:enabled")
        assert tab.page.inner_text("#asked") == "stopped"
        tab.until("document.querySelector('.answer:first-child h3').textContent.includes('cancelled')")
        tab.page.reload()
        tab.state("live")
        # Two of 401, which Chromium writes down itself.
        assert all("401" in said for said in tab.complaints)
        tab.close()


def test_a_board_that_goes_and_comes_back(browser: Any, verifier: str) -> None:
    options = ("--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (process, url):
        tab = Tab(browser, url)
        tab.state("live")
        tab.ask(PROMPT, tokens=8)
        process.terminate()
        tab.state("lost")
        port = url.rsplit(":", 1)[1]
        process.wait()
        with board_process(verifier, *options, "--port", port):
            tab.state("live")
            # It is another life: its answers are numbered anew.
            tab.until("document.querySelectorAll('.answer').length === 0")
            tab.ask(PROMPT, tokens=8)
            assert tab.page.locator(".answer").count() == 1
            tab.close()


def test_unverified_tokens_are_marked_and_struck_when_withdrawn(
    browser: Any, target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.2)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(both(target, draft, on_link_loss="draft")) as pair,
    ):
        tab = Tab(browser, pair.url)
        tab.state("live")
        tab.page.fill("#max-tokens", "200")
        tab.page.fill("#temperature", "0")
        tab.page.click("#go")
        tab.page.wait_for_selector(f"{SHOWN} .accepted", state="attached")
        portal.call(pair.cloud.stop)
        tab.until("document.querySelectorAll('#answers .unverified').length > 20")
        tab.page.wait_for_selector("#fault:visible")
        portal.call(pair.cloud.start)
        tab.page.wait_for_selector("#go:enabled")
        tab.until("!document.querySelector('#answers .unverified, .answer[data-writing]')")
        tab.until("document.querySelector('#fault').hidden")
        struck = tab.page.locator(f"{SHOWN} .withdrawn").count()
        verified = f"{SHOWN} span:not(.prompt, .withdrawn)"
        text = "".join(tab.page.eval_on_selector_all(verified, "spans => spans.map(s => s.textContent)"))
        assert tab.page.inner_text("#count-withdrawn") == str(struck)
        assert tab.complaints == []
        tab.close()
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "speculation": False}
        answer = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).json()
        assert text == answer["choices"][0]["text"]
        assert struck > 0


def test_the_files_are_served_with_a_strict_policy(url: str) -> None:
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


def test_the_files_name_no_other_host_and_write_no_html() -> None:
    for name, _ in dashboard.PAGE_FILES.values():
        text = (dashboard.STATIC_DIRECTORY / name).read_text()
        for address in re.findall(r"(?:https?:)?//[\w.]+\.\w+", text):
            assert address == "http://www.w3.org", f"{name}: {address}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
        assert not re.search(r"<style|\sstyle=|\son\w+=", text), name
