"""A headless Chromium, and a page that records its requests and errors."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
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


class Tab:
    """One page of a browser.

    Attributes:
        page: the Playwright page.
        requests: URLs that it requested.
        problems: errors and warnings on its console, uncaught exceptions, and dialogs.
    """

    def __init__(self, browser: Any, url: str, *, width: int = 1280, height: int = 900, scheme: str = "dark") -> None:
        self._context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self._context.new_page()
        self.page.set_default_timeout(300_000)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type in ("error", "warning") else None,
        )
        self.page.goto(f"{url}/")

    def wait_for_state(self, state: str) -> None:
        """Wait until the connection is in this state: `live`, `lost`, `key` or `waiting`."""
        self.page.wait_for_selector(f'#status[data-state="{state}"]')

    def wait_until(self, expression: str, seconds: float = 300.0) -> None:
        """Wait until `expression` is true. Playwright's `wait_for_function` needs `eval`, which the page forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never became true: {expression}"
            self.page.wait_for_timeout(50)

    def ask(
        self,
        prompt: str,
        temperature: float = 0.7,
        tokens: int = 32,
        *,
        speculation: bool = True,
        chat: bool = False,
    ) -> str:
        """Submit the prompt form, wait for the end of the answer, and return the status line of the form."""
        page = self.page
        page.set_checked("#chat", chat)
        page.fill("#prompt", prompt)
        page.fill("#temperature", str(temperature))
        page.fill("#max-tokens", str(tokens))
        page.set_checked("#speculation", speculation)
        count = page.locator(".answer").count()
        page.click("#go")
        self.wait_until(f"document.querySelectorAll('.answer').length > {count} || {count} === 8")
        page.wait_for_selector("#go:enabled")
        page.wait_for_selector(".answer:first-child:not([data-writing]) h3 span:last-child")
        return str(page.inner_text("#asked"))

    def close(self) -> None:
        self._context.close()
