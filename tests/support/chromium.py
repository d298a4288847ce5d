"""A real browser, for what people look at. REPLICATION_SCREENSHOTS=DIR keeps a picture of every page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from required import do_without

CHROMIUM = "/usr/bin/chromium"
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Chromium driven by playwright; it runs an event loop of this thread, so it ends with the file of tests."""
    reason = ""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "playwright is not installed (pip install '.[test]')"
    if not reason and shutil.which(CHROMIUM) is None:
        reason = f"no {CHROMIUM} (Debian: apt-get install chromium)"
    if reason:
        do_without("chromium", reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture(scope="module")
def clean() -> Callable[[object], None]:
    """Fails where axe finds anything wrong with a page."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        do_without("axe", "axe-playwright-python is not installed (pip install '.[test]')")

    def check(page) -> None:
        found = Axe().run(page).response["violations"]
        assert [(v["id"], node["html"][:200]) for v in found for node in v["nodes"]] == [], page.url

    return check


def picture(page, name: str) -> None:
    folder = os.environ.get("REPLICATION_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page="whole" in name)
