"""Opens a page in a real browser without a network, for tests."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
"""Without these, the browser contacts hosts of its vendor."""


class OpenPage:
    """An open page, with its console messages and errors, and its requests."""

    def __init__(self, page: Any, messages: list[str], requests: list[str]) -> None:
        self.page = page
        self.messages = messages
        self.requests = requests

    def wait_for_charts(self) -> None:
        """Wait until the charts show what the forms select."""
        self.page.wait_for_selector("body[data-drawn=yes]")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium. Skips the test if there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser (chromium): tests/install.sh")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))


@contextlib.contextmanager
def open_page(
    browser: Any, file: Path, width: int = 1100, scheme: str = "light"
) -> Iterator[OpenPage]:
    """Open `file` in a window that is `width` pixels wide."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    messages: list[str] = []
    requests: list[str] = []
    try:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        yield OpenPage(page, messages, requests)
    finally:
        context.close()
