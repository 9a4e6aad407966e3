"""The page's Markdown in a real browser: compared with markdown-it, harmless, and every character in its color."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.edge_runtime.service.browser import Tab, chromium

# As a chat model writes it.
ANSWER = """\
# Sorting a list

A *stable* sort keeps **equal** items in order; `sorted` is one, `list.sort()` too.
It takes `n log n` steps.

1. First, **decide** on the key:
   - the name
   - the *age*, in years
2. Then sort:

   ```python
   people.sort(key=lambda person: person["age"])  # 1 < 2 & *not emphasis*
   ```
3. Done.

> A quote with `code`
> over two lines

| name | age |
|------|----:|
| Ada | 36 |
| **Alan** | `41` |

See [the manual](https://docs.example/a_b?c=1&d=2). snake_case_name, 2 * 3 * 4, \\*escaped\\*, ~~gone~~

---

* star
* item
"""
CASES = {
    "answer": ANSWER,
    "unclosed code block": "Look:\n\n```js\nlet a = 1;\n\nlet b",
    "unclosed emphasis": "a **b and *c",
    "nested emphasis": "**bold *both* bold**",
    "double backticks": "``a ` b`` c",
    "list after text": "Tips:\n- one\n- two\n\nEnd.",
    "loose list": "- one\n\n- two\n\n  more\n\ntext",
    "indented list": "  - one\n    - two\n  - three",
    "parentheses": "1) one\n2) two",
    "start": "7. seven\n8. eight",
    "headings": "### Three\ntext\n##### Five",
    "no heading": "#5 is a number",
    "tilde fence": "~~~\ncode\n~~~\nafter",
    "empty": "",
    "blank lines": "\n\na\n\n\n\nb\n",
}
# Renders with the page's module and returns the HTML in markdown-it's form.
RENDER = """async ([source, kinds]) => {
  const { MarkdownView } = await import("/markdown.js");
  const home = document.createElement("div");
  new MarkdownView(home).update(source, kinds);
  return home;
}"""
NORMALIZE = """home => {
  for (const span of home.querySelectorAll("span:not(.code span)")) span.replaceWith(...span.childNodes);
  for (const code of home.querySelectorAll(".code")) {
    const pre = code.querySelector("pre");
    pre.removeAttribute("tabindex");
    code.replaceWith(pre);
  }
  for (const table of home.querySelectorAll(".table")) table.replaceWith(...table.childNodes);
  for (const element of home.querySelectorAll("*")) {
    for (const name of ["title", "target", "rel", "class", "style"]) element.removeAttribute(name);
    if (element.getAttribute("start") === "1") element.removeAttribute("start");
  }
  // A list of single paragraphs is written without them, whether or not there are blank lines between its items.
  for (const p of home.querySelectorAll("li > p")) p.replaceWith(...p.childNodes, " ");
  home.normalize();
  const texts = document.createTreeWalker(home, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    if (!text.parentElement.closest("pre")) text.data = text.data.replace(/\\s+/g, " ");
  }
  // The page has headings of its own above those of an answer.
  return home.innerHTML.replace(/<(\\/?)h(\\d)>/g, (_, end, level) => `<${end}h${level}>`)
    .replace(/>\\s+</g, "><").replace(/\\s+(<\\/?(p|li|ul|ol|pre|blockquote)>)/g, "$1")
    .replace(/(<(li|blockquote)>)\\s+/g, "$1").replaceAll("\\n</code>", "</code>")
    .replaceAll("<br> ", "<br>").trim();
}"""


@pytest.fixture(scope="module")
def tab(url: str) -> Iterator[Tab]:
    with chromium() as browser:
        opened = Tab(browser, url)
        opened.wait_for_state("live")
        yield opened
        opened.close()


def render(tab: Tab, source: str, kinds: str = "") -> Any:
    return tab.page.evaluate_handle(RENDER, [source, kinds])


@pytest.mark.slow
@pytest.mark.parametrize("source", CASES.values(), ids=CASES.keys())
def test_markdown_is_that_of_markdown_it(tab: Tab, source: str) -> None:
    reference = MarkdownIt("commonmark", {"breaks": True}).enable(["table", "strikethrough"])
    # Headings below those of the page.
    tokens = reference.parse(source)
    for token in tokens:
        if token.type.startswith("heading_"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
    # The page's policy forbids styles, here those of aligned columns.
    wanted = re.sub(r' style="[^"]*"', "", reference.renderer.render(tokens, reference.options, {}))
    expected = tab.page.evaluate(
        f"html => ({NORMALIZE})(new DOMParser().parseFromString(`<div>${{html}}</div>`, 'text/html').body.firstChild)",
        wanted,
    )
    assert tab.page.evaluate(NORMALIZE, render(tab, source)) == expected


@pytest.mark.slow
def test_growing_text_is_rendered_as_the_whole(tab: Tab) -> None:
    """The view keeps the blocks that did not change."""
    grown = """async ([source, kinds]) => {
      const { MarkdownView } = await import("/markdown.js");
      const [home, whole] = [document.createElement("div"), document.createElement("div")];
      const view = new MarkdownView(home);
      const wrong = [];
      for (let end = 0; end <= source.length; end += 1) {
        view.update(source.slice(0, end), kinds.slice(0, end));
        const fresh = document.createElement("div");
        new MarkdownView(fresh).update(source.slice(0, end), kinds.slice(0, end));
        if (fresh.innerHTML !== home.innerHTML) wrong.push(end);
      }
      const first = home.firstChild;
      view.update(source + "\\n\\nmore", kinds);
      return [wrong, home.firstChild === first];
    }"""
    assert tab.page.evaluate(grown, [ANSWER, "aaoc" * (len(ANSWER) // 4)]) == [[], True]


@pytest.mark.slow
def test_every_character_keeps_the_color_of_its_origin(tab: Tab) -> None:
    # Letters of each origin stand for themselves, so the color of every shown letter is known.
    source = ANSWER.translate(str.maketrans({"e": "a", "n": "c", "s": "o", "i": "u"}))
    kinds = "".join(letter if letter in "acou" else " " for letter in source)
    shown = render(tab, source, kinds).evaluate(
        """home => {
          const found = [];
          const walker = document.createTreeWalker(home, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const text = walker.currentNode;
            const parent = text.parentElement;
            if (!parent.closest(".code > div")) for (const c of text.data) found.push([c, parent.className]);
          }
          return found;
        }"""
    )
    names = {"a": "accepted", "c": "corrected", "o": "own", "u": "unverified"}
    assert {c for c, _ in shown} >= set(names)
    assert [(c, name) for c, name in shown if (names.get(c, "") != name)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "<img src=x onerror=alert(1)><script>alert(1)</script><style>*{}</style>",
        "[a](javascript:alert(1)) [b](data:text/html,x) [c]( JaVaScRiPt:alert(1)) [d](vbscript:x) [e](//host/x)",
        "![a](https://evil.example/pixel.png)",
        '[a](https://x.example/"onclick="alert(1)) <a href="javascript:alert(1)">b</a>',
        "`<b>` **<i>x</i>** | <u> |\n|---|---|\n| <s>y</s> | z |",
        "```<svg/onload=alert(1)>\n<iframe src=javascript:alert(1)>\n```",
    ],
)
def test_hostile_text_stays_text(tab: Tab, source: str) -> None:
    view = render(tab, source)
    elements = view.evaluate("home => [...home.querySelectorAll('*')].map(e => e.tagName)")
    assert set(elements) <= {
        *("P", "A", "SPAN", "CODE", "STRONG", "EM", "BR", "DIV", "PRE", "BUTTON"),
        *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD"),
    }
    links = view.evaluate("home => [...home.querySelectorAll('a')].map(a => [a.protocol, a.rel, a.target])")
    assert all(link == ["https:", "noopener noreferrer", "_blank"] for link in links), links
    attributes = view.evaluate("home => [...home.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert tab.problems == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["*a ", "**", "[", "`", "_a_b", "> ", "- ", "[a](", "](", "http", "https://a.", "|-", "~~x", "a\n", "- a\n"],
)
def test_long_hostile_text_does_not_hang_the_page(tab: Tab, piece: str) -> None:
    """In quadratic time, these would take minutes."""
    measure = """async (piece) => {
      const { MarkdownView } = await import("/markdown.js");
      const home = document.createElement("div");
      new MarkdownView(home).update(piece.repeat(100000), "");
      return home.childElementCount;
    }"""
    assert tab.page.evaluate(measure, piece) > 0
