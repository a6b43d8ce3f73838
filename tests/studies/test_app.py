"""`ecanet app`: what the page says of an image, and the page itself in a real browser (`make test-browser`)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet import recipes, training
from ecanet.attention import Attention
from ecanet.data.sources import SMALL_SETS
from ecanet.errors import ConfigError, DataError
from ecanet.studies.app import answers, page
from ecanet.training.tasks import build
from tiny_runs import TINY, add_tiny


@pytest.fixture
def task(monkeypatch):
    add_tiny(monkeypatch)
    torch.manual_seed(0)
    return build(TINY, SMALL_SETS["tiny"].spec).eval()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grey.png"
    noise = torch.randint(0, 255, (8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(noise.numpy()).save(path)
    return path


# answers


def test_gates_go_off_from_the_last_one_on(task, picture):
    """Switched off one by one, the classes change with each gate until they are those of the plain network."""
    shown = [answers.answer(task, picture, off) for off in range(len(answers.list_gates(task)) + 1)]
    assert len(shown) == 10
    for one in shown:
        assert one.plain == shown[0].plain
        assert sum(one.classes.values()) == pytest.approx(1)
    assert shown[-1].classes == shown[-1].plain
    grey = torch.from_numpy(np.array(Image.open(picture)))[None, None]
    with torch.no_grad():
        shares = task(task.spec.normalize(grey))[0].softmax(0)
    assert sorted(shown[0].classes.values()) == pytest.approx(sorted(shares.tolist()))
    assert len({tuple(one.classes.values()) for one in shown}) == 10
    # the weights of gates that come before all that are off stay as they are
    first = [dict(one.weights)["layer1.0.eca"] for one in shown]
    assert all(torch.equal(first[0], weights) for weights in first)
    last = [dict(one.weights)["layer3.2.eca"] for one in shown]
    assert torch.equal(last[0], last[1])
    assert not torch.equal(last[0], last[2])


def test_the_network_is_as_it_was_afterwards(task, picture):
    before = {name: value.clone() for name, value in task.state_dict().items()}
    first, again = answers.answer(task, picture), answers.answer(task, picture, 0)
    answers.answer(task, picture, 5)
    assert answers.answer(task, picture).classes == first.classes == again.classes
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert not any(module._forward_hooks for module in task.modules() if isinstance(module, Attention))


def test_a_network_without_gates(monkeypatch, picture):
    add_tiny(monkeypatch)
    plain = build(TINY.but(model=TINY.model.but(attention="none")), SMALL_SETS["tiny"].spec).eval()
    found = answers.answer(plain, picture)
    assert found.classes == found.plain
    assert found.weights == []


def test_the_picture_is_what_the_network_sees(task, picture):
    found = answers.answer(task, picture)
    assert (found.picture.shape, found.picture.dtype) == ((3, 8, 8), torch.uint8)
    assert found.picture.float().std() > 10


def test_a_file_that_is_no_image(task, tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(DataError, match=r"x\.png"):
        answers.answer(task, tmp_path / "x.png")


def test_gates_of_any_width_have_rows_of_one_width():
    stacked = answers.stack_weights([("a", torch.tensor([0.0, 1.0])), ("b", torch.arange(512.0))])
    assert stacked.shape == (2, 256)
    assert stacked[0].tolist() == [0.0] * 128 + [1.0] * 128
    assert stacked[1, :2].tolist() == [0.5, 2.5]


def test_without_gradio(monkeypatch, task):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'ecanet\[app\]'"):
        page.build(task)


# the page, in a browser

BROWSER = pytest.mark.browser


@contextmanager
def serve(run, folder, port):
    command = [
        sys.executable,
        "-m",
        "ecanet",
        "app",
        str(run),
        "--images",
        str(folder),
        "--no-browser",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True
    )
    try:
        for _ in range(120):
            time.sleep(1)
            assert process.poll() is None, process.stdout.read()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
                break
            except OSError:
                pass
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        process.stdout.close()


@contextmanager
def open_browser(width=1300, height=1100):
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


def wait_for(condition, seconds=60):
    for _ in range(10 * seconds):
        try:
            if found := condition():
                return found
        except Exception:  # the page is being drawn anew
            pass
        time.sleep(0.1)
    raise AssertionError("the page did not get there")


def text(browser):
    return browser.find_element("tag name", "body").text


def read_labels_of(page):
    """Return the classes with gates and without, in the order in which the page shows them, with their shares."""
    with_gates, without = re.search(
        r"\nClasses\n(.*?)\nClasses with every gate off\n(.*?)\nWhere", page, re.DOTALL
    ).groups()
    return with_gates, without


def read_labels(browser):
    return read_labels_of(text(browser))


def upload(browser, path):
    wait_for(lambda: browser.find_elements("css selector", "input[type=file]"))[0].send_keys(str(path))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app")
    report = training.run(recipes.find("quickstart").but(epochs=3), folder=folder / "run", device="cpu", quiet=True)
    images = report.folder / "examples"
    with serve(report.folder, images, 7871) as address:
        yield address, sorted(images.glob("*.png"))


@BROWSER
def test_an_image_is_answered_and_no_other_server_is_asked(served):
    address, images = served
    with open_browser() as browser:
        browser.get(address)
        upload(browser, images[0])
        wait_for(lambda: "100%" in text(browser) or text(browser).count("%") >= 10)
        wait_for(lambda: len(browser.find_elements("css selector", "img")) >= 3)
        time.sleep(1)
        if target := os.environ.get("ECANET_SCREENSHOTS"):
            browser.save_screenshot(str(Path(target) / "app.png"))
        entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@BROWSER
def test_the_slider_turns_gates_off(served):
    address, images = served
    with open_browser() as browser:
        browser.get(address)
        upload(browser, images[-1])
        before = wait_for(lambda: text(browser).count("%") >= 10 and text(browser))
        number = browser.find_element("css selector", "input[type=number]")
        number.clear()
        number.send_keys("9\n")
        wait_for(lambda: text(browser) != before and len(set(read_labels(browser))) == 1)
    assert len(set(read_labels_of(before))) == 2


@BROWSER
def test_a_picture_of_the_folder_is_chosen(served):
    address, _ = served
    with open_browser() as browser:
        browser.get(address)
        wait_for(lambda: browser.find_elements("css selector", "button.thumbnail-item"))[2].click()
        wait_for(lambda: text(browser).count("%") >= 10)


@BROWSER
@pytest.mark.parametrize("kind", ["text", "huge"])
def test_a_wrong_file_is_one_line(served, tmp_path, kind):
    address, _ = served
    path = tmp_path / "wrong.png"
    path.write_bytes(b"no image" if kind == "text" else bytes(26 * 2**20))
    with open_browser() as browser:
        browser.get(address)
        upload(browser, path)
        wait_for(lambda: "Error" in text(browser) or ("rror" in browser.page_source and "toast" in browser.page_source))
        assert "Traceback" not in text(browser)
        assert text(browser).count("%") == 0


@BROWSER
def test_two_users_at_once(served):
    address, images = served
    with open_browser() as one, open_browser() as other:
        for browser in (one, other):
            browser.get(address)
        upload(one, images[0])
        upload(other, images[1])
        for browser in (one, other):
            wait_for(lambda browser=browser: text(browser).count("%") >= 10)
