"""A page in a real browser, without a network, for the tests."""

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
"""A browser that is told less looks for its makers' hosts."""


class Opened:
    """A page that has been opened, what it complained about and what it asked for."""

    def __init__(self, page: Any, complaints: list[str], requests: list[str]) -> None:
        self.page = page
        self.complaints = complaints
        self.requests = requests

    def redrawn(self) -> None:
        """Wait until the figures are those that the forms ask for."""
        self.page.wait_for_selector("body[data-drawn=yes]")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser (chromium): tests/install.sh")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))


@contextlib.contextmanager
def opened(browser: Any, file: Path, width: int = 1100, scheme: str = "light") -> Iterator[Opened]:
    """The page in `file`, in a window of so many pixels."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    complaints: list[str] = []
    requests: list[str] = []
    try:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        yield Opened(page, complaints, requests)
    finally:
        context.close()
