"""A headless Chromium for the tests, driven over WebDriver."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

T = TypeVar("T")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_SECONDS = 30
POLL_SECONDS = 0.02
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--window-size=1280,1000",
)  # fmt: skip


@contextlib.contextmanager
def chromium() -> Iterator[Chrome]:
    """A browser with a profile of its own, both gone at the end. Skips the test where there is none, but not in CI."""
    programs = [path for name in CHROMIUM if (path := shutil.which(name))]
    driver = shutil.which("chromedriver")
    if not programs or driver is None:
        reason = "needs Chromium and chromedriver: on Debian, apt-get install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="pgchan-browser-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = programs[0]
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = Chrome(options=options, service=ChromeService(driver))
        browser.set_script_timeout(WAIT_SECONDS)
        try:
            yield browser
        finally:
            browser.quit()


def wait_until(browser: Chrome, fact: Callable[[], T], what: str, seconds: float = WAIT_SECONDS) -> T:
    """The first true value of `fact`, looked at until then; names `what` when it does not come true in time."""
    return WebDriverWait(browser, seconds, POLL_SECONDS).until(lambda _: fact(), what)


def text(browser: Chrome, selector: str) -> str:
    """The text of all elements that match, as the page holds it, joined by line ends."""
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent).join('\\n')"
    return str(browser.execute_script(script, selector))


def count(browser: Chrome, selector: str) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, selector))


def click(browser: Chrome, selector: str) -> None:
    browser.find_element(By.CSS_SELECTOR, selector).click()


def complaints(browser: Chrome) -> list[dict[str, Any]]:
    """What the browser's console holds of errors: scripts that threw, resources that were refused."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
