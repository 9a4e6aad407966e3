"""A headless Chromium, and a page that watches itself."""

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
    """Debian's Chromium, driven by Playwright. Skips where either is lacking."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here: apt install chromium-headless-shell")
    with playwright.sync_playwright() as driver:
        # CI is root, whom Chromium's sandbox does not serve.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """One page of a browser.

    Attributes:
        page: Playwright's.
        requests: URLs that it asked for.
        complaints: errors and warnings on its console, and exceptions that nobody caught.
    """

    def __init__(self, browser: Any, url: str, *, width: int = 1280, height: int = 900, scheme: str = "dark") -> None:
        self._context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self._context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on(
            "console",
            lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None,
        )
        self.page.goto(f"{url}/")

    def state(self, state: str) -> None:
        """Waits until the page says that it is `live`, wants a `key`, or the like."""
        self.page.wait_for_selector(f'#status[data-state="{state}"]')

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Waits until `expression` is true. Playwright's own waiting would need `eval`, which the page forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never came about: {expression}"
            self.page.wait_for_timeout(50)

    def ask(self, prompt: str, temperature: float = 0.7, tokens: int = 32, *, speculation: bool = True) -> str:
        """Fills in the form, waits for the end, and returns what the page says of it."""
        page = self.page
        page.fill("#prompt", prompt)
        page.fill("#temperature", str(temperature))
        page.fill("#max-tokens", str(tokens))
        page.set_checked("#speculation", speculation)
        known = page.locator(".answer").count()
        page.click("#go")
        self.until(f"document.querySelectorAll('.answer').length > {known} || {known} === 8")
        page.wait_for_selector("#go:enabled")
        page.wait_for_selector(".answer:first-child:not([data-writing]) h3 span:last-child")
        return str(page.inner_text("#asked"))

    def close(self) -> None:
        self._context.close()
