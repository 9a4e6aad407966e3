"""A headless Chromium, and a page that records its requests and errors."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start Debian's Chromium with Playwright; skip the test if either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here: apt install chromium-headless-shell")
    with playwright.sync_playwright() as driver:
        # CI runs as root, which Chromium's sandbox does not support.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


FIND_NEWEST_CHAT = """() => Object.keys(localStorage).filter(key => key.startsWith("flexspec-chat-"))
  .map(key => JSON.parse(localStorage[key])).sort((a, b) => b.updated - a.updated)[0]"""

# The events of an answer arrive a moment after its text; a browser that keeps nothing has nothing to compare.
ORIGINS_ARE_KNOWN = f"""(() => {{
  let last = null;
  try {{ last = ({FIND_NEWEST_CHAT})()?.messages.at(-1); }} catch {{ return true; }}
  return !last?.finish || last.error || last.finish === "cancelled" || last.kinds.length === last.content.length;
}})()"""


class Tab:
    """One page of a browser.

    Attributes:
        page: the Playwright page.
        requests: URLs that it requested.
        bodies: what it sent.
        problems: errors and warnings on its console, uncaught exceptions, and dialogs.
    """

    def __init__(
        self,
        browser: Any,
        url: str,
        *,
        width: int = 1280,
        height: int = 900,
        scheme: str = "dark",
        permissions: Sequence[str] = (),
    ) -> None:
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, permissions=list(permissions)
        )
        self.page = self._context.new_page()
        self.page.set_default_timeout(300_000)
        self.requests: list[str] = []
        self.bodies: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", self._record)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type in ("error", "warning") else None,
        )
        self.page.goto(f"{url}/")

    def wait_for_state(self, state: str) -> None:
        """Wait until the connection is in this state: `live`, `lost`, `key`, `connecting` or `loading`."""
        self.page.wait_for_selector(f'#status[data-state="{state}"]')

    def wait_until(self, expression: str, seconds: float = 300.0) -> None:
        """Wait until `expression` is true. Playwright's `wait_for_function` needs `eval`, which the page forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never became true: {expression}"
            self.page.wait_for_timeout(50)

    def set_settings(self, **settings: str | float | bool | None) -> None:
        """Change settings of the chat; None empties a field. The names are those of the request."""
        page = self.page
        page.click("#open-settings")
        for name, value in settings.items():
            field = f'#settings-form [name="{name}"]'
            if isinstance(value, bool):
                page.set_checked(field, value)
            elif page.locator(field).evaluate("field => field.tagName") == "SELECT":
                page.select_option(field, str(value))
            else:
                page.fill(field, "" if value is None else str(value))
        page.click('#settings-form button[type="submit"]')

    def send(self, message: str) -> None:
        """Send a message without waiting for its answer."""
        self.page.fill("#message", message)
        self.page.press("#message", "Enter")

    def wait_for_answer(self) -> None:
        """Wait until no answer is being written and the last one is complete, with the origins of its tokens."""
        self.page.wait_for_selector("#send:visible")
        self.wait_until("!document.querySelector('.answer[data-writing], .message[data-writing]')")
        self.wait_until(ORIGINS_ARE_KNOWN)
        # They are shown in the frame after the one that begins now, at the latest.
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def ask(self, message: str, **settings: str | float | bool | None) -> dict[str, Any]:
        """Send a message, wait for the answer, and return the answer's message as the browser keeps it."""
        if settings:
            self.set_settings(**settings)
        count = self.page.locator(".message").count()
        self.send(message)
        self.wait_until(f"document.querySelectorAll('.message').length >= {count} + 2")
        self.wait_for_answer()
        answer: dict[str, Any] = self.chat()["messages"][-1]
        return answer

    def chat(self) -> dict[str, Any]:
        """Return the newest chat as the browser keeps it."""
        chat: dict[str, Any] = self.page.evaluate(FIND_NEWEST_CHAT)
        return chat

    def _record(self, request: Any) -> None:
        self.requests.append(request.url)
        if request.post_data:
            self.bodies.append(request.post_data)

    def close(self) -> None:
        self._context.close()
