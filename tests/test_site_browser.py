"""The built documentation site in a real browser (`make test-browser`): search, dark and light, narrow, and offline."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from browsing import open_browser, text, wait_for

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
FIND_RESULTS = """
const found = []
const walk = root => root.querySelectorAll("*").forEach(element => {
  if (element.tagName === "A" && element.href.includes("?h=")) found.push(element.href)
  if (element.shadowRoot) walk(element.shadowRoot)
})
walk(document)
return found
"""
"""Search draws its results in a shadow tree, which selectors do not reach."""

FIND_WIDE_CODE = """
const blocks = [...document.querySelectorAll(".highlight:not(.language-text) pre > code")]
return blocks.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60))
"""
"""Blocks of code that must be moved to be read; drawn tables and output may be."""

READ_COLOURS = """
const style = getComputedStyle(document.querySelector(".md-typeset p"))
return [getComputedStyle(document.body).backgroundColor, style.color]
"""


@pytest.fixture(scope="module")
def pages():
    """The pages of the site, built as `make docs` builds it."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    zensical = shutil.which("zensical", path=folders)
    if zensical is None:
        pytest.skip("needs the extra docs")
    subprocess.run([sys.executable, "docs/stage.py", "build/docs"], cwd=ROOT, check=True)
    subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT, check=True, capture_output=True)
    return sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(pages):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(address):
    with open_browser() as browser:
        yield browser


def search(browser, words):
    """Return the addresses that the search finds."""
    browser.find_element("tag name", "body").send_keys("/")
    field = wait_for(lambda: (e := browser.switch_to.active_element).tag_name != "body" and e)
    field.send_keys(words)
    return wait_for(lambda: browser.execute_script(FIND_RESULTS))


@pytest.mark.parametrize(
    ("words", "page"),
    [("kernel size", "kernel-size.html"), ("ecanet ablate", "commands.html"), ("TensorRT", "tensorrt.html")],
)
def test_search_finds_a_page_and_a_command(browser, address, words, page):
    browser.get(address + "index.html")
    found = search(browser, words)
    (first, *_) = [url for url in found if urlsplit(url).path.endswith(page)]
    browser.get(first)
    assert words.split()[-1].lower() in text(browser).lower()


def brightness(colour):
    """Return the relative luminance of a colour of CSS (WCAG 2)."""
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_dark_and_light_follow_the_system_and_the_button(browser, address):
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(address + "algebra.html")
        ground, words = map(brightness, browser.execute_script(READ_COLOURS))
        assert (max(ground, words) + 0.05) / (min(ground, words) + 0.05) >= 4.5
        seen[scheme] = ground
    assert seen["light"] > 0.8
    assert seen["dark"] < 0.1
    for _ in range(2):  # from the system's setting to light, and to dark
        button = [e for e in browser.find_elements("css selector", "label[for^=__palette]") if e.is_displayed()]
        before = browser.execute_script("return document.body.dataset.mdColorMedia")
        button[0].click()
        wait_for(lambda before=before: browser.execute_script("return document.body.dataset.mdColorMedia") != before)
        seen[before] = brightness(browser.execute_script(READ_COLOURS)[0])
    assert seen["(prefers-color-scheme)"] > 0.8
    assert seen["(prefers-color-scheme: light)"] < 0.1


def test_no_page_is_wider_than_a_phone(browser, address, pages):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    wide = []
    for page in pages:
        browser.get(address + page)
        width = browser.execute_script("return document.documentElement.scrollWidth")
        if width > 400:
            wide.append((page, width))
        code = browser.execute_script(FIND_WIDE_CODE)
        wide += [(page, text) for text in code]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide == []


def test_tables_fit_beside_the_text(browser, address, pages):
    """On a wide screen every column is in sight; the networks' long table of references to code may be moved."""
    screen = {"width": 1600, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    cut, seen = [], 0
    for page in pages:
        if page == "attach-sweep.html":
            continue
        browser.get(address + page)
        widths = browser.execute_script(
            "return [...document.querySelectorAll('.md-typeset__scrollwrap')].map(e => [e.scrollWidth, e.clientWidth])"
        )
        seen += len(widths)
        cut += [(page, *pair) for pair in widths if pair[0] > pair[1] + 1]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert seen > 20
    assert cut == []


def test_every_link_and_anchor_is_there(pages):
    anchors = {page: set(re.findall(r'\sid="?([^"\s>]+)', (SITE / page).read_text())) for page in pages}
    dead, links = [], 0
    for page in pages:
        for target in re.findall(r'\s(?:href|src)="?([^"\s>]+)', (SITE / page).read_text()):
            parts = urlsplit(urljoin(f"http://site/{page}", target))
            if parts.netloc != "site":
                continue
            links += 1
            name = unquote(parts.path).lstrip("/") or "index.html"
            whole = name in anchors and parts.fragment and unquote(parts.fragment) not in anchors[name]
            if not (SITE / name).is_file() or (whole and not parts.fragment.startswith("__")):
                dead.append((page, target))
    assert links > 1000
    assert dead == []


def test_no_request_leaves_the_machine(browser, address, pages):
    """Everything that the tests above have asked for, and every kind of page once more."""
    for page in ("index.html", "algebra.html", "reference/commands.html", "results.html"):
        browser.get(address + page)
    search(browser, "gate")
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
