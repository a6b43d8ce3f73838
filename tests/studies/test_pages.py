"""The pages and pictures of `inspect`, `ablate`, `paper` and `bench`: one template, one palette, nothing cut."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drawn_texts import find_unreadable
from ecanet import recipes
from ecanet.attention import GateRecord
from ecanet.report import figures
from ecanet.studies.ablate import comparison, grid, variants
from ecanet.studies.ablate import figures as ablate_figures
from ecanet.studies.ablate import pages as ablate_pages
from ecanet.studies.bench import figures as bench_figures
from ecanet.studies.bench import pages as bench_pages
from ecanet.studies.gates import drawings
from ecanet.studies.paper import figures as paper_figures
from ecanet.studies.paper import pages as paper_pages
from ecanet.studies.paper import tables
from ecanet.studies.paper.printed import TABLES

ROOT = Path(__file__).resolve().parents[2]


def read_result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def ablation():
    """The published ablation: its scores, in the order in which they were run."""
    rows = read_result("ablation-fashion-mnist")["rows"]
    recipe = recipes.find("fashion")
    recipe = recipe.but(model=recipe.model.but(name="resnet8"))
    names = [row["variant"] for row in rows]
    planned = variants.plan(recipe, [name for name in names if name != "none"], lambda line: None)
    measured = {
        (row["variant"], int(seed)): {"metrics": {"top1": score}, "seconds": row["seconds"]}
        for row in rows
        for seed, score in row["top1_by_seed"].items()
    }
    results = comparison.compare([one for one in planned if one.name in names], measured, 5)
    return grid.Ablation(recipe=recipe, folder=Path(), seeds=[0, 1, 2, 3, 4], results=results)


@pytest.fixture(scope="module")
def gates():
    """Three gates with long names and kernels of two sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    return [
        GateRecord(
            name=f"backbone.stage{at}{5 * '.a_long_name'}.eca", gain=1.0, ceiling=1.0,
            counts=torch.tensor([4, 4]), class_means=draw(2, 64), mean=draw(64), deviation=0.1 * draw(64),
            lowest=draw(64), highest=draw(64), saturated=0.0, kernel=torch.randn(3 + 2 * at, generator=generator),
        )
        for at in range(3)
    ]  # fmt: skip


def list_drawings(gates):
    effects = [drawings.Effect(name=one.name, log_odds=1.0, held=0.5, weights=one.mean) for one in gates]
    return [
        drawings.draw_classes(gates, {0: "a name of twenty-four le", 1: "other"}),
        drawings.draw_image(gates, effects),
        drawings.draw_weights(gates),
        drawings.draw_spread(gates),
        drawings.draw_kernels(gates),
    ]


def test_what_the_gates_drawings_say_can_be_read(gates):
    for drawing in list_drawings(gates):
        assert find_unreadable(drawing.to_figure()) == []
        assert drawing.to_html().count("<svg") == len(drawing.panels)


def test_what_an_ablations_pictures_say_can_be_read(ablation):
    for figure in (ablate_figures.draw(ablation), *ablate_figures.draw_panels(ablation)):
        assert find_unreadable(figure) == []


def test_scores_of_two_seeds_stay_in_their_range_and_names_stand_on_the_intervals(ablation):
    wide = [replace(one, score=replace(one.score, half=150.0)) for one in ablation.results]
    panels = [figure.axes[0] for figure in ablate_figures.draw_panels(replace(ablation, results=wide))]
    (axes,) = [axes for axes in panels if axes.get_xlabel() == "parameters"]
    low, high = axes.get_ylim()
    assert -5 < low < high < 105
    assert len(axes.texts) == len(wide)
    assert all(name.get_bbox_patch() is not None for name in axes.texts)


@pytest.mark.parametrize("count", [2, 3])
def test_networks_that_differ_by_a_few_parameters_only_can_be_told_apart(ablation, count):
    small = replace(ablation, results=ablation.results[:count])
    for figure in (ablate_figures.draw(small), *ablate_figures.draw_panels(small)):
        assert find_unreadable(figure) == []
    axes = figure.axes[0]
    edge = axes.get_window_extent().x1
    assert all(name.get_window_extent().x1 < edge for name in axes.texts)


@pytest.mark.parametrize("name", [pytest.param("bench-cpu-quick", marks=pytest.mark.slow), "bench-cpu-quick-compiled"])
def test_what_the_benchmarks_pictures_say_can_be_read(name):
    result = read_result(name)
    for figure in (bench_figures.draw(result), *bench_figures.draw_panels(result)):
        assert find_unreadable(figure) == []


def test_what_the_papers_pictures_say_can_be_read():
    for figure in (paper_figures.draw_figure_1(), paper_figures.draw_figure_4()):
        assert find_unreadable(figure) == []


def test_a_label_that_is_cut_or_covered_is_found():
    figure, axes = figures.make_axes(3, 3, xlabel="a label that is far too long for three inches, by every measure")
    axes.annotate("one", (0.5, 0.5))
    axes.annotate("two", (0.5, 0.5))
    found = find_unreadable(figure)
    assert [text for text in found if text.startswith("a label")]
    assert "one on two" in found


@pytest.mark.slow
def test_the_pages_have_one_template_and_need_no_other_file(ablation, gates, tmp_path):
    measured = [tables.measure_table(TABLES[name], [], None, None, "cpu") for name in ("3", "later")]
    result = read_result("bench-cpu-quick")
    paper_pages.write(measured, tmp_path)
    pages = [ablate_pages.to_html(ablation), bench_pages.to_html(result), (tmp_path / "paper.html").read_text()]
    for page in pages:
        assert "prefers-color-scheme: dark" in page
        assert page.count("<h2>Environment</h2>") == 1
        assert not re.findall(r"""(?:src|href)=["']?(?!data:|#|["']?#)""", page)
    assert [page.count("<h2>Recipe</h2>") for page in pages] == [1, 0, 0]
    assert pages[0].count("<tr><td data-name='variant'>") == 2 * len(ablation.results)
    assert pages[1].count("<td data-name='network'>") == len(result["networks"])
    assert pages[1].count("<td data-name='shape'>") == len(result["layers"])
    assert pages[2].count("<td data-name='notes'>") == sum(len(one.table.rows) for one in measured)


def test_there_is_one_palette():
    """Colours of other palettes, and legends with a white box, which hides its text on a dark page."""
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        assert not re.findall(r"""["']tab:|["']C\d["']|color="black"|RdBu""", text), path
        assert len(re.findall(r"\.legend\(", text)) == len(re.findall(r"\.legend\([^)]*frameon=False", text)), path
