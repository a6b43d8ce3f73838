"""The page of `ecanet app` in a real browser (`make test-browser`): a classifier's page, and a detector's."""

import io
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

import lightning as L
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from browsing import open_browser, text, wait_for
from ecanet import recipes, training
from ecanet.data.scenes import SceneConfig, make_scenes

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


# a detector


@pytest.fixture(scope="module")
def served_detector(tmp_path_factory):
    """Serve a detector of one short epoch, which prefers any object to the background."""

    class PreferObjects(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *batch):
            scores = pl_module.model.roi_heads.box_predictor.cls_score
            scores.weight.data.zero_()
            scores.bias.data.copy_(torch.tensor([-20.0, *[0.0] * (len(scores.bias) - 1)]))

    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("detector")
    scenes = make_scenes(SceneConfig(train=24, held_out=3), folder / "scenes")
    changes = {"data.name": f"coco:{scenes}", "data.root": None, "data.batch_size": 4, "epochs": 1}
    recipe = recipes.with_settings(
        recipes.find("scenes"), {**changes, "ema_decay": None, "detector.backbone": "resnet20"}
    )
    report = training.run(recipe, folder=folder / "run", device="cpu", quiet=True, callbacks=[PreferObjects()])
    with serve(report.folder, scenes / "val2017", 7872) as address:
        yield address, report.folder, sorted((scenes / "val2017").iterdir())


@BROWSER
def test_a_detector_draws_its_boxes_and_masks(served_detector, tmp_path):
    """The page shows the picture that `ecanet detect` writes, at the lowest score that the slider gives."""
    address, run, images = served_detector
    (expected,) = training.detect(
        training.restore(run), [images[0]], tmp_path, threshold=0.05, device=torch.device("cpu")
    )
    assert expected["objects"]
    assert any("mask" in one for one in expected["objects"])
    drawn = pil_to_tensor(Image.open(expected["picture"]).convert("RGB")).float()
    with open_browser() as browser:
        browser.get(address)
        upload(browser, images[0])
        number = wait_for(lambda: browser.find_element("css selector", "input[type=number]"))
        number.clear()
        number.send_keys("0.05\n")

        def read_picture():
            sources = [one.get_attribute("src") for one in browser.find_elements("css selector", "img")]
            for source in sources:
                if "/file=" in source:
                    shown = Image.open(io.BytesIO(urllib.request.urlopen(source).read())).convert("RGB")
                    if shown.size == (drawn.shape[2], drawn.shape[1]):
                        return pil_to_tensor(shown).float()
            return None

        # The page's format for pictures loses a little.
        wait_for(lambda: (shown := read_picture()) is not None and float((shown - drawn).abs().mean()) < 8)
        names = [one["name"] for one in expected["objects"]]
        wait_for(lambda: sum(f"{one['score']:.2f}" in text(browser) for one in expected["objects"]) == len(names))
        if target := os.environ.get("ECANET_SCREENSHOTS"):
            browser.save_screenshot(str(Path(target) / "app-detector.png"))
