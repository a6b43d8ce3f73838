"""A run's report in a real browser (`make test-browser`): on a telephone and a wide screen, in light and in dark."""

import pytest
import torch

from browsing import open_browser
from ecanet import recipes
from ecanet.recipes import Recipe
from ecanet.report import Report, environment
from reading import find_faults, set_screen

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with early values far from the later ones, cells of every shade, and gates."""
    folder = tmp_path_factory.mktemp("run")
    late = [(0.2 - 0.004 * at, 98.0 + 0.04 * at) for at in range(20)]
    history = [
        {"epoch": epoch + 1, "train_loss": loss, "val_loss": 1.1 * loss, "top1": top1, "macro": top1 - 1.5,
         "learning_rate": 0.1, "images_per_second": 500.0, "seconds": 2.0}
        for epoch, (loss, top1) in enumerate([(2.1, 61.4), (4.9, 35.6), (1.4, 74.4), (1.2, 73.9), *late])
    ]  # fmt: skip
    matrix = [[0] * at + [10 - at, at] + [0] * (8 - at) for at in range(9)]
    gates = [
        {"name": f"layer{at}.0.eca", "mean": [0.9, 1.0, 1.2], "deviation": [0.1, 0.0, 0.2], "alarms": []}
        for at in range(9)
    ]
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    report = Report(
        recipe=Recipe(name="trial", epochs=24),
        metrics={"val_loss": 0.6667, "top1": 70.0, "best_top1": 71.5},
        history=history,
        seconds=6.0,
        parameters=12345,
        folder=folder,
        environment=environment(),
        artifacts={
            "class_names": [f"class {at}" for at in range(10)],
            "confusion": [row[:10] for row in [*matrix, [0] * 9 + [10]]],
            "examples": [{"image": image, "label": 1, "prediction": 2, "probability": 0.6}],
            "gates": gates,
        },
    )
    return report.write().as_uri()


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The report of a detector: twelve metrics, gates deep in the network, and a long path in its settings."""
    losses = ("train_loss", "classifier_loss", "box_reg_loss", "mask_loss", "objectness_loss", "rpn_box_reg_loss")
    metrics = [f"{kind}AP{part}" for kind in ("", "mask_") for part in ("", "50", "75", "S", "M", "L")]
    history = [
        {"epoch": epoch + 1, **{name: (7 - at) / (epoch + 1) for at, name in enumerate(losses)},
         **{name: (5 * at + 7 * epoch) % 12 / 12 for at, name in enumerate(metrics)},
         "learning_rate": 0.1 - 0.01 * epoch}
        for epoch in range(5)
    ]  # fmt: skip
    boxes = torch.tensor([[10.0, 20.0, 50.0, 60.0], [70.0, 5.0, 120.0, 40.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.6])}
    example = {"image": torch.full((3, 128, 128), 200, dtype=torch.uint8), "right": False, "found": found,
               "truth": {"boxes": boxes + 3, "labels": torch.tensor([2, 2])}}  # fmt: skip
    gates = [
        {"name": f"backbone.body.layer{1 + at // 3}.{at % 3}.eca", "mean": [0.4, 0.5, 0.6], "deviation": [0.1] * 3,
         "alarms": []}
        for at in range(9)
    ]  # fmt: skip
    recipe = recipes.find("scenes")
    report = Report(
        recipe=recipe.but(data=recipe.data.but(name="coco:/data/photographs/of/boats/and/harbours"), epochs=5),
        metrics=history[-1],
        history=history,
        seconds=6.0,
        parameters=12345,
        folder=tmp_path_factory.mktemp("detector"),
        environment=environment(),
        artifacts={
            "class_names": ["boat", "harbour"],
            "precision_recall": {"boxes": [1 - at / 100 for at in range(101)], "masks": [0.5] * 101},
            "detections": [example, {**example, "right": True}],
            "gates": gates,
        },
    )
    return report.write().as_uri()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1600])
def test_everything_on_the_page_can_be_read(browser, page, width, scheme):
    set_screen(browser, width, scheme)
    browser.get(page)
    assert find_faults(browser, width) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1600])
def test_everything_about_a_detector_can_be_read(browser, detector, width, scheme):
    set_screen(browser, width, scheme)
    browser.get(detector)
    sides = browser.execute_script("return [...document.querySelectorAll('.grid img')].map(e => e.clientWidth)")
    assert min(sides) >= 300  # the names on it have 11 of its 384 pixels at least
    assert find_faults(browser, width) == []


def test_what_cannot_be_read_is_found(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        "<body style='background: #fff'><p style='color: #999'>pale</p><p style='font-size: 5px'>tiny</p>"
        "<div style='overflow-x: auto; width: 90px'><p style='width: 900px; white-space: nowrap'>words that are too"
        " long for their box</p></div><p style='width: 900px'>wide</p>"
    )
    set_screen(browser, 400, "light")
    browser.get((tmp_path / "page.html").as_uri())
    found = " ".join(find_faults(browser, 400))
    for fault in ("contrast 2.8: pale", "5.0 pixels: tiny", "cut: words that are too long", "pixels wide"):
        assert fault in found
