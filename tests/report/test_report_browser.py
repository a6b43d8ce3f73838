"""A run's report in a real browser (`make test-browser`): on a telephone and a wide screen, in light and in dark."""

import pytest
import torch

from browsing import open_browser
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
def browser():
    with open_browser() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1600])
def test_everything_on_the_page_can_be_read(browser, page, width, scheme):
    set_screen(browser, width, scheme)
    browser.get(page)
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
