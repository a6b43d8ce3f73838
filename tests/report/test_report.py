"""The report's page shows the results and needs no other file."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ecanet.errors import DataError
from ecanet.recipes.config import Recipe
from ecanet.report import Report, environment, figures, pictures, write_file

MATRIX = [[7, 2, 1], [0, 10, 0], [3, 3, 4]]
NAMES = ["cat", "<dog> & co", "horse"]


@pytest.fixture
def report(tmp_path):
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    history = [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "top1": 10.0 * epoch, "learning_rate": 0.1,
         "images_per_second": 500.0, "seconds": 2.0}
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    return Report(
        recipe=Recipe(name="trial", epochs=3),
        metrics={"val_loss": 0.6667, "top1": 70.0, "best_top1": 71.5},
        history=history,
        seconds=6.0,
        parameters=12345,
        folder=tmp_path,
        environment=environment(),
        artifacts={
            "class_names": NAMES,
            "confusion": MATRIX,
            "examples": [
                {"image": image, "label": 0, "prediction": 0, "probability": 0.9},
                {"image": image, "label": 1, "prediction": 2, "probability": 0.6},
            ],
            "gates": [
                {
                    "name": "layer1.0.eca",
                    "mean": [0.9, 1.0, 1.2],
                    "deviation": [0.1, 0.0, 0.2],
                    "alarms": ["it is odd"],
                },
                {"name": "layer2.0.eca", "mean": [1.0] * 8, "deviation": [0.0] * 8, "alarms": []},
            ],
        },
    )


@pytest.fixture
def without_drawings(monkeypatch):
    """Leave the drawings out, which take longer than the rest of the page."""
    for name in [name for name in vars(figures) if name.startswith("plot_")]:
        monkeypatch.setattr(figures, name, lambda *values: "")


def test_the_page_needs_no_other_file(report):
    page = report.to_html()
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert sources
    # images are part of the page, and drawings refer to their own marks
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.findall(r"<(?:script|link|iframe)\b|url\((?!#)|@import", page)


def test_the_page_is_well_formed_and_escapes_names(report):
    page = report.to_html()
    assert "<dog>" not in page
    assert "&lt;dog&gt; &amp; co" in page
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br", "hr", "path", "use", "rect"):
                opened.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if tag not in ("path", "use", "rect"):
                assert opened.pop() == tag

    Checker().feed(page)
    assert opened == []


@pytest.mark.usefixtures("without_drawings")
def test_the_page_shows_the_numbers(report):
    text = re.sub(r"<[^>]+>", " ", report.to_html())
    for shown in (
        "71.5",
        "12,345",
        "trial: resnet20 with eca on digits",
        "7 of 10",
        "10 of 10",
        "4 of 10",
        "horse 60%",
    ):
        assert shown in " ".join(text.split()), shown


def test_classes_are_listed_worst_first_with_their_rivals():
    rows = re.findall(
        r"<tr><td>(.*?)</td>.*?<td>(\d+ of \d+)</td><td>(.*?)</td></tr>", pictures.show_accuracy(MATRIX, NAMES)
    )
    assert [(name, count) for name, count, _ in rows] == [
        ("horse", "4 of 10"), ("cat", "7 of 10"), ("&lt;dog&gt; &amp; co", "10 of 10")
    ]  # fmt: skip
    assert rows[1][2] == "&lt;dog&gt; &amp; co (2)"
    assert rows[2][2] == ""


def test_a_class_without_images_does_not_divide_by_zero():
    assert "0 of 0" in pictures.show_accuracy([[0, 0], [1, 1]], ["a", "b"])
    assert "<svg" in figures.plot_confusion([[0, 0], [1, 1]], ["a", "b"])


def test_long_tables_list_only_the_worst_classes():
    n = 50
    matrix = [[10 - at % 10 if a == at else (at % 10 if a == (at + 1) % n else 0) for a in range(n)] for at in range(n)]
    table = pictures.show_accuracy(matrix, [f"c{at}" for at in range(n)])
    assert table.count("<tr><td>") == pictures.MAX_LISTED_CLASSES
    assert "20 better classes are left out" in table


def test_to_png_keeps_the_pixels():
    import io

    import numpy as np
    from PIL import Image

    for channels in (1, 3):
        image = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        read = torch.from_numpy(np.array(Image.open(io.BytesIO(figures.to_png(image)))))
        assert torch.equal(read if channels == 1 else read.permute(2, 0, 1), image.squeeze(0))


@pytest.mark.usefixtures("without_drawings")
def test_a_report_is_read_as_it_was_written(report):
    page = report.write()
    assert page.read_text() == report.to_html()
    assert sorted(path.name for path in (report.folder / "examples").iterdir()) == ["00-cat.png", "01--dog-co.png"]
    again = Report.read(report.folder)
    assert again.to_dict() == report.to_dict()


def test_unreadable_reports_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no finished run here \(metrics.json is missing\)"):
        Report.read(tmp_path)
    for text in ("{", "[]", '{"recipe": {}}', '{"recipe": {"epoch": 3}}'):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(DataError, match="not a report that this version can read"):
            Report.read(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_file(path, "old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_spike_does_not_decide_the_axis(report):
    assert figures.find_limits([0.5, 0.4, 0.35, 0.3, 0.28, 900.0]) == pytest.approx((0.269, 0.511))
    assert figures.find_limits([0.5, 0.4, 0.35, 0.3, 0.28, -900.0, float("nan")]) == pytest.approx((0.269, 0.511))
    # what has no spread, or few values, or only values near each other, is drawn whole
    for values in ([1.0] * 9 + [5.0], [0.1, 0.2, 900.0], [3.0, 2.0, 1.5, 1.2, 1.1, 1.0], []):
        assert figures.find_limits(values) is None
    for row in report.history:
        row["val_loss"] = row["train_loss"]
    plain = figures.plot_curves([{**report.history[0], "epoch": epoch, "val_loss": 1 / epoch} for epoch in range(1, 8)])
    history = [{**report.history[0], "epoch": epoch, "val_loss": 1 / epoch} for epoch in range(1, 8)]
    history[3]["val_loss"] = 1e6
    spiked = figures.plot_curves(history)
    assert "<!-- 1e+06 -->" in spiked
    assert "<!-- 1e+06 -->" not in plain
    assert not re.search(r"<!-- [\d.]*[2-9]00000", spiked), "the axis is the others'"


def test_drawings_take_the_colour_of_the_pages_text(report):
    page = report.to_html()
    assert page.count("<svg") == 5
    assert "currentColor" in page
    for black in ("#000000", "#010203", "fill: black", "stroke: #ffffff; stroke-linejoin: miter"):
        assert black not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


@pytest.mark.usefixtures("without_drawings")
def test_the_page_shows_what_differs_from_the_named_recipe(report):
    from ecanet import recipes

    text = show_text(report)
    assert "All settings" in text
    assert "recipe quickstart" not in text
    report.recipe = recipes.with_settings(recipes.find("quickstart"), {"epochs": 20, "data.batch_size": 32})
    text = show_text(report)
    assert "setting this run recipe quickstart" in text
    assert "epochs 20 12" in text
    assert "data.batch_size 32 64" in text
    assert "frozen_stages" not in text, "a classifier has no detector's settings"
    report.recipe = recipes.find("quickstart")
    assert "As in the recipe quickstart." in show_text(report)
    report.recipe = recipes.find("scenes")
    assert "frozen_stages" in show_text(report)


@pytest.mark.usefixtures("without_drawings")
def test_the_page_says_how_the_network_is_used(report, tmp_path):
    from ecanet import recipes

    report.folder = tmp_path / "it's <here>"
    text = show_text(report)
    assert f"training.restore(&quot;{tmp_path}/it&#x27;s &lt;here&gt;&quot;)" in text
    assert "ecanet predict" in text
    report.recipe = recipes.find("scenes")
    assert "ecanet detect" in show_text(report)


def test_the_page_shows_the_gates(report):
    page = report.to_html()
    assert "layer1.0.eca: it is odd" in page
    assert "<!-- layer2.0.eca -->" in page
    report.artifacts["gates"] = []
    assert "<h2>Gates</h2>" not in report.to_html()


def show_text(report) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", report.to_html()).split())
