"""A headless Chromium for the tests marked ``browser``, which `make test-browser` runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def open_browser(width: int = 1300, height: int = 1100) -> Iterator[Any]:
    """Yield a browser that records the addresses that it asks for."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    if Path("/usr/bin/chromium").exists():
        options.binary_location = "/usr/bin/chromium"
    driver = Path("/usr/bin/chromedriver")
    browser = webdriver.Chrome(options, webdriver.ChromeService(str(driver)) if driver.exists() else None)
    try:
        yield browser
    finally:
        browser.quit()


def wait_for(condition: Callable[[], Any], seconds: int = 60) -> Any:
    """Return the first true value of ``condition``; an exception means that the page is being drawn anew."""
    for _ in range(10 * seconds):
        try:
            if found := condition():
                return found
        except Exception:
            pass
        time.sleep(0.1)
    raise AssertionError("the page did not get there")


def text(browser: Any) -> str:
    """Return the words that the page shows."""
    return browser.find_element("tag name", "body").text
