"""Chromium, Debian's, driven by Playwright: what a page does in a real browser.

Playwright's package brings the driver and no browser; the browser that it would fetch is not needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.debian import install
from tests.parts import PartMissing, fail_or_skip

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PACKAGES = ("chromium", "fonts-liberation")
NEEDED = ("playwright", "axe_playwright_python")
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/bin:/bin"


def find_chromium() -> str | None:
    """The program's path, None where there is none."""
    found = (shutil.which(name, path=SYSTEM_PATH) for name in NAMES)
    return next((path for path in found if path), None)


def install_chromium() -> str:
    """The path of Chromium; as root, Debian's is installed where there is none. Raises PartMissing."""
    install(PACKAGES, lambda: () if find_chromium() else ("chromium",))
    path = find_chromium()
    assert path is not None
    return path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A headless Chromium. In CI a missing part is a failure, elsewhere a skip."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise PartMissing(f"not installed: {', '.join(missing)} (make test installs them)")
        path = install_chromium()
    except PartMissing as error:
        fail_or_skip(str(error))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root has no sandbox of its own to give, and the pages are the tests' own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Seen:
    """What a page said and asked for while it was open."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


Opened = Callable[..., Any]


@contextmanager
def opened(browser: Browser, file: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[tuple[Page, Seen]]:
    """A file in a window of this width, in pixels, with its charts drawn; what it says and asks for is kept."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    seen = Seen()
    page.on("console", lambda message: seen.messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.messages.append(f"error: {error}"))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.as_uri())
    page.evaluate("labctlReport.drawn")
    yield page, seen
    context.close()
