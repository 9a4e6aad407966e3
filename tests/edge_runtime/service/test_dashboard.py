"""The page in a real browser: its live view, its connection, its looks on every screen, and what it must never do."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import httpx
import openai
import pytest
from anyio.from_thread import start_blocking_portal

from cloud_verifier.model.target import Target
from edge_runtime.decoding import offline
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service import dashboard
from edge_runtime.service.monitoring.words import load_words
from tests.edge_runtime.service.browser import Tab
from tests.edge_runtime.service.conftest import board_process, service_pair

PROMPT = "def read_config(path):\n"
NEWEST_TEXT = ".answer:first-child pre"
# The target continues what it reads, so that its own text is hostile as well.
HOSTILE = " ".join(["<img src=x>"] * 5)
WORDS = load_words()


def complete(tab: Tab, url: str, **options: Any) -> str:
    """Have the board continue the prompt, as another client; return the text when the page shows its end."""
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 32, **options}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    text: str = answer["choices"][0]["text"]
    shown = json.dumps(body["prompt"] + text)
    tab.wait_until(f"document.querySelector('{NEWEST_TEXT}')?.textContent.endsWith({shown})")
    tab.page.wait_for_selector(".answer:first-child:not([data-writing])", state="attached")
    return text


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
def test_answers_of_all_clients_are_shown_as_colored_tokens_and_curves(
    tab: Tab, url: str, client: openai.OpenAI
) -> None:
    text = complete(tab, url)
    timings = client.completions.create(model="", prompt=PROMPT, temperature=0, max_tokens=32).timings
    complete(tab, url)
    tokens = tokens_by_kind(tab)
    assert tokens["prompt"] == [PROMPT]
    assert len(tokens["accepted"]) == timings["draft_n_accepted"]
    assert len(tokens["corrected"]) + len(tokens.get("own", [])) == 32 - len(tokens["accepted"])
    assert tab.page.text_content(NEWEST_TEXT) == PROMPT + text
    # The kinds differ by more than color, and are explained by the words that `top` uses.
    styles = {
        kind: tab.page.eval_on_selector(
            f"#legend .{kind}", "e => getComputedStyle(e).textDecoration + getComputedStyle(e).font"
        )
        for kind in WORDS.tokens
    }
    assert len(set(styles.values())) == 5
    for kind, words in WORDS.tokens.items():
        assert tab.page.inner_text(f"#legend .{kind}") == words
    assert int(tab.page.inner_text("#count-accepted").replace(",", "")) >= len(tokens["accepted"])

    # Curves move, the chart of rounds has bars, and the numbers are those of the board.
    curve = '[data-gauge="rate"] .curve'
    tab.wait_until(f"(document.querySelector('{curve}').getAttribute('d') || '').split('L').length > 2")
    before = tab.page.get_attribute(curve, "d")
    tab.wait_until(f"document.querySelector('{curve}').getAttribute('d') !== '{before}'")
    for gauge in ("rate", "acceptance", "draft", "rtt", "bytes"):
        assert tab.page.is_visible(f'[data-gauge="{gauge}"]'), gauge
        assert WORDS.gauges[gauge].name in tab.page.get_attribute(f'[data-gauge="{gauge}"] svg', "aria-label")
    assert tab.page.locator("#rounds rect").count() > 4
    assert (
        tab.page.inner_text("#plan") == "This board drafts 5 tokens; the target model verifies them and adds 1 token."
    )
    assert tab.page.inner_text("#plan-reason") == "Reason: fixed plan"
    assert re.fullmatch(r"[\d.]+ [kM]?B", tab.page.inner_text("#sent"))
    assert "on this machine" in tab.page.inner_text("#privacy")
    assert tab.page.inner_text("#verifier").startswith("http://127.0.0.1:")

    assert tab.problems == []
    assert tab.requests
    assert all(requested.startswith(("data:", f"{url}/")) for requested in tab.requests), tab.requests


@pytest.mark.slow
def test_the_bar_of_times_is_to_scale(tab: Tab, url: str) -> None:
    complete(tab, url)
    tab.wait_until("document.querySelectorAll('#times span').length > 0")
    legend = tab.page.inner_text("#times-legend")
    percents = {part: int(re.search(rf"{words}.*?(\d+) %", legend)[1]) for part, words in WORDS.times.items()}  # type: ignore[index]
    assert 99 <= sum(percents.values()) <= 101
    widths = dict(
        tab.page.evaluate(
            """[...document.querySelectorAll("#times span")]
              .map(s => [s.className, 100 * s.offsetWidth / s.parentElement.clientWidth])"""
        )
    )
    for part, percent in percents.items():
        assert widths.get(part, 0) == pytest.approx(percent, abs=1)


@pytest.mark.slow
def test_html_of_the_model_is_never_interpreted(tab: Tab, url: str) -> None:
    # The toy target goes on like this.
    text = complete(tab, url, prompt=HOSTILE)
    assert "<img src=x>" in text, "the target generated no HTML, so this tests nothing"
    assert tab.page.locator("main img, main script, main [onerror]").count() == 0
    assert tab.problems == []


@pytest.mark.slow
def test_speculation_can_be_switched_off(tab: Tab, url: str) -> None:
    complete(tab, url, speculation=False)
    assert not tokens_by_kind(tab).get("accepted")
    assert "switched speculation off" in tab.page.inner_text("#plan-reason")
    assert tab.page.inner_text("#plan") == (
        "The target model writes up to 32 tokens by itself; this board does not draft."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(360, 640, "light"), (820, 1180, "dark"), (1280, 800, "light")]
)
def test_the_page_fits_every_screen(browser: Any, url: str, width: int, height: int, scheme: str) -> None:
    tab = Tab(browser, url, width=width, height=height, scheme=scheme)
    tab.wait_for_state("live")
    tab.ask("x" * 200 + "\n" + PROMPT, temperature=0)
    page = tab.page
    inside = """element => {
      const { left, right, top, bottom } = element.getBoundingClientRect();
      return left >= 0 && right <= innerWidth && top >= 0 && bottom <= innerHeight;
    }"""
    tabs = page.is_visible(".tabs")
    assert tabs == (width < 900)
    for view in ("chat", "live"):
        if tabs:
            page.click(f".tabs [data-view={view}]")
            assert page.is_visible("#chat") == (view == "chat")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.eval_on_selector(f"#{view}", inside)
        assert page.eval_on_selector(f"#{view}", "e => [e, ...e.children].every(x => x.scrollWidth <= e.clientWidth)")
        if view == "chat":
            assert page.eval_on_selector("#composer", inside), "the composer is always in view"
            for dialog, button in (("#settings", "#open-settings"), ("#chats", "#open-chats")):
                page.click(button)
                assert page.eval_on_selector(dialog, inside)
                assert page.eval_on_selector(dialog, "e => e.scrollWidth <= e.clientWidth")
                page.keyboard.press("Escape")
    # Phones zoom into inputs with smaller text.
    page.click(".tabs [data-view=chat]") if tabs else None
    small = """[...document.querySelectorAll('textarea, select, input:not([type="checkbox"])')]
      .filter(e => parseFloat(getComputedStyle(e).fontSize) < 16).map(e => e.id)"""
    assert page.evaluate(small) == []
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_sufficient_contrast_and_all_controls_a_name(browser: Any, url: str, scheme: str) -> None:
    """WCAG's contrast ratio of 4.5 for all text on the page."""
    tab = Tab(browser, url, scheme=scheme)
    tab.wait_for_state("live")
    tab.ask(PROMPT, temperature=0)
    tab.ask("x " * 5000)
    tab.page.wait_for_selector(".error:visible")
    tab.page.evaluate("for (const details of document.querySelectorAll('#live details')) details.open = true")
    assert tab.page.evaluate(FIND_LOW_CONTRAST) == []
    tab.page.click("#open-settings")
    assert tab.page.evaluate(FIND_LOW_CONTRAST) == []
    unnamed = """[...document.querySelectorAll("input, textarea, select, button, [role]:not([role=status])")]
      .filter(e => e.checkVisibility() && !e.labels?.length && !e.ariaLabel && !e.textContent.trim())
      .map(e => e.outerHTML)"""
    assert tab.page.evaluate(unnamed) == []
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
def test_the_page_reconnects_to_a_restarted_service(browser: Any, verifier: str) -> None:
    options = ("--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (process, url):
        tab = Tab(browser, url)
        tab.wait_for_state("live")
        complete(tab, url, max_tokens=8)
        process.terminate()
        tab.wait_for_state("lost")
        port = url.rsplit(":", 1)[1]
        process.wait()
        with board_process(verifier, *options, "--port", port):
            tab.wait_for_state("live")
            # The new process numbers its answers from 1 again.
            tab.wait_until("document.querySelectorAll('.answer').length === 0")
            complete(tab, url, max_tokens=8)
            assert tab.page.locator(".answer").count() == 1
            tab.close()


@pytest.mark.slow
def test_unverified_tokens_are_marked_and_struck_through_when_withdrawn(
    browser: Any, target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(service_pair(target, draft, on_link_loss="draft")) as pair,
    ):
        tab = Tab(browser, pair.url)
        tab.wait_for_state("live")
        tab.set_settings(temperature=0, max_tokens=200)
        tab.send(PROMPT)
        tab.page.wait_for_selector(f"{NEWEST_TEXT} .accepted", state="attached")
        portal.call(pair.verifier.stop)
        tab.wait_until("document.querySelectorAll('#answers .unverified').length > 20")
        tab.page.wait_for_selector("#fault:visible")
        portal.call(pair.verifier.start)
        tab.wait_for_answer()
        tab.wait_until("!document.querySelector('#answers .unverified, .answer[data-writing]')")
        tab.wait_until("document.querySelector('#fault').hidden")
        withdrawn = tab.page.locator(f"{NEWEST_TEXT} .withdrawn").count()
        verified = f"{NEWEST_TEXT} span:not(.prompt, .withdrawn)"
        text = "".join(tab.page.eval_on_selector_all(verified, "spans => spans.map(s => s.textContent)"))
        assert tab.page.inner_text("#count-withdrawn") == str(withdrawn)
        answer = tab.chat()["messages"][-1]
        assert answer["withdrawn"] == withdrawn > 0
        assert f"{withdrawn} {WORDS.tokens['withdrawn']}" in tab.page.inner_text(".message:last-child footer")
        assert tab.problems == []
        tab.close()
        body = {"messages": [{"role": "user", "content": PROMPT.strip()}], "max_tokens": 200, "temperature": 0}
        response = httpx.post(f"{pair.url}/v1/chat/completions", json=body | {"speculation": False}, timeout=300)
        wanted = response.json()["choices"][0]["message"]["content"]
        assert text.startswith(wanted)
        assert answer["content"] == wanted


@pytest.mark.slow
def test_files_are_served_with_a_strict_content_security_policy(url: str) -> None:
    for path, name in dashboard.PAGE_FILES.items():
        plain = httpx.get(url + path, headers={"accept-encoding": "identity"})
        for answer in (plain, httpx.get(url + path)):
            assert answer.status_code == 200
            assert answer.content == (dashboard.STATIC_DIRECTORY / name).read_bytes()
            assert answer.headers["content-type"].partition(";")[0] == dashboard.MEDIA_TYPES[name.rpartition(".")[2]]
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert (plain.headers.get("content-encoding"), answer.headers["content-encoding"]) == (None, "gzip")
    assert httpx.get(f"{url}/", headers={"host": "evil.example"}).status_code == 403
    for path in ("/static/index.html", "/dashboard.png", "/%2e%2e/app.py", "/index.html"):
        assert httpx.get(url + path).status_code == 404


def test_the_page_is_small() -> None:
    files = [(dashboard.STATIC_DIRECTORY / name).read_bytes() for name in dashboard.PAGE_FILES.values()]
    assert sum(len(gzip.compress(contents)) for contents in files) < 40_000


def test_files_name_no_other_host_and_insert_no_html() -> None:
    for name in dashboard.PAGE_FILES.values():
        text = (dashboard.STATIC_DIRECTORY / name).read_text()
        for address in re.findall(r"(?:https?:)?//[\w.]+\.\w+", text):
            assert address == "http://www.w3.org", f"{name}: {address}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
        assert not re.search(r"<style|\sstyle=|\son\w+=", text), name
