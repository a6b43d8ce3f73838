"""The paper's tables: what is printed, what is counted here, what is said about both."""

import json
import shlex

import pytest
import torch

import ecanet
from ecanet.errors import ConfigError, DataError
from ecanet.studies.paper import pages as paper_pages
from ecanet.studies.paper import tables as paper
from ecanet.studies.paper.rows import FOOTNOTES, TABLES, Network


@pytest.fixture(scope="module")
def counted() -> dict[str, paper.Measured]:
    # Table 5 takes a while, and is counted in test_paper_detection
    return {name: paper.run(name, measure=["params", "flops"])[0] for name in TABLES if name != "5"}


def cells(measured: paper.Measured, column: str, *, own: bool) -> list[paper.Cell]:
    return [c[column] for row, c in zip(measured.table.rows, measured.cells, strict=True) if row.own is own]


def test_every_cell_the_authors_counted_is_reproduced(counted):
    parameters = cells(counted["3"], "#Param", own=True) + cells(counted["poster"], "#Param", own=True)
    operations = cells(counted["3"], "FLOPs", own=True) + cells(counted["poster"], "FLOPs", own=True)
    assert (len(parameters), len(operations)) == (18, 18)
    assert all(cell.agrees and not cell.here for cell in parameters)
    assert [str(c) for c in operations if c.here] == ["319.9M ✓ (319.97 cut)"]  # the 18th, marked
    assert sum(bool(c.agrees and not c.here) for c in operations) == 17


def test_the_module_column_of_table_2(counted):
    column = [found["#Param"] for found in counted["2"].cells]
    assert len(column) == 10
    assert all(cell.agrees for cell in column)


def test_rows_copied_from_other_papers_show_our_count(counted):
    copied = [
        found for row, found in zip(counted["3"].table.rows, counted["3"].cells, strict=True) if "copied" in row.notes
    ]
    assert len(copied) == 5
    for found in copied:
        assert not found["#Param"].agrees
        assert "x 10^6" in str(found["#Param"])
    assert str(copied[0]["#Param"]) == "33.00M (here 31.37M; 32.90 x 10^6)"


def test_three_other_networks_confirm_the_rules(counted):
    """Table 4's Inception-v3 and two DenseNets, by torchvision: parameters and operations to the printed digit."""
    rows = {row.printed["Model"]: found for row, found in zip(TABLES["4"].rows, counted["4"].cells, strict=True)}
    for model in ("Inception-v3", "DenseNet-264 (k=32)", "DenseNet-161 (k=48)"):
        assert rows[model]["#Param"].agrees
        assert rows[model]["FLOPs"].agrees
    assert not rows["ResNet-200"]["#Param"].agrees


@pytest.mark.parametrize(
    ("printed", "ours", "own", "said"),
    [
        ("24.37M", 25_557_032, True, "24.37M ✓"),
        ("24.38M", 25_557_032, True, "24.38M (here 24.37M; today)"),
        ("3.85G", 4_142_000_000, True, "3.85G ✓ (3.858 cut)"),
        ("3.85G", 4_142_000_000, False, "3.85G (here 3.86G; today)"),
        ("319.9M", 335_512_960, True, "319.9M ✓ (319.97 cut)"),
        ("319.9M", 334_512_960, True, "319.9M (here 319.0M; today)"),
    ],
)
def test_comparison_to_the_printed_digit(printed, ours, own, said):
    assert str(paper.compared(printed, ours, "today", own)) == said


def test_a_wrong_module_is_found_out():
    row = TABLES["2"].rows[1]
    assert row.network is not None
    wrong = paper.Row(network=Network(name="resnet50", attention="se", options={"reduction": 8}), printed=row.printed)
    cell = paper.module_parameters(wrong)
    assert not cell.agrees
    assert f"{2 * 1024**2 // 8:,} at C = 1024" in str(cell)


@pytest.mark.parametrize("name", ["2", "3", "poster", "figure4"])
def test_every_command_describes_its_rows_network(name, monkeypatch):
    """Each command, parsed by the command line itself, comes to a recipe whose network is the row's."""
    from ecanet import cli, training

    recipes = []

    class RanError(Exception):
        pass

    def record(recipe, **kwargs):
        recipes.append((recipe, kwargs["folder"]))
        raise RanError

    monkeypatch.setattr(training, "run", record)
    for row in TABLES[name].rows:
        line = paper.command(row.network)
        assert line is not None
        assert row.network is not None
        with pytest.raises(RanError):
            cli.app(shlex.split(line)[1:], standalone_mode=False)
        recipe, folder = recipes[-1]
        model = recipe.model
        assert (model.name, model.attention, model.options) == (
            row.network.name,
            row.network.attention,
            row.network.options,
        )
        assert model.kernel_sizes == row.network.kernel_sizes
        assert recipe.data.name == "folder:PATH"
        assert recipe.epochs == (400 if model.name == "mobilenet_v2" else 100)
        assert folder.name == row.network.key
    assert len({str(folder) for _, folder in recipes}) == len(recipes)


def test_accuracy_is_evaluated_where_there_are_data_and_weights(tmp_path, monkeypatch):
    from ecanet import training

    asked = []

    def evaluate(checkpoint, *, model, data_name):
        asked.append((checkpoint.name, model.attention, data_name))
        return {"top1": 77.476, "top5": 93.62}

    monkeypatch.setattr(training, "evaluate", evaluate)
    for name in ("resnet50-eca.pth.tar", "resnet50-eca-3333.pth"):
        (tmp_path / name).touch()
    measured = paper.run("3", measure=["accuracy"], data=tmp_path, weights=tmp_path)[0]
    assert asked == [("resnet50-eca.pth.tar", "eca", f"folder:{tmp_path}")]
    assert str(measured.cells[7]["Top-1"]) == "77.48 ✓"
    assert str(measured.cells[7]["Top-5"]) == "93.68 (here 93.62)"
    assert str(measured.cells[0]["Top-1"]) == "75.20"
    assert "not measured" in paper_pages.markdown(paper.run("3", measure=["accuracy"]))


@pytest.mark.slow
def test_accuracy_of_a_real_checkpoint(tmp_path):
    """A random ECA-ResNet-50 on six images of two classes: evaluated, not guessed."""
    from PIL import Image

    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (240, 230), (80 * i, 10, 200)).save(folder / f"{i}.png")
    weights = tmp_path / "weights"
    weights.mkdir()
    model = ecanet.create_model("resnet50", num_classes=2)
    torch.save(model.state_dict(), weights / "resnet50-eca.pth")
    measured = paper.run("3", measure=["accuracy"], data=tmp_path / "data", weights=weights)[0]
    top1 = float(measured.cells[7]["Top-1"].here)
    assert any(abs(top1 - 100 * k / 6) < 0.01 for k in range(7))


def test_speed_is_a_share_of_the_plain_networks_rate():
    """Two networks, the second with four times the work: its share is well below one, the plain one's is one."""
    networks = [Network(name="resnet20"), Network(name="resnet56")]
    train, infer = paper.seconds_per_step(networks, "cpu", batch=2, side=16, rounds=3)
    for times in (train, infer):
        assert [len(t) for t in times] == [3, 3]
        plain, larger = paper.shares(times, plain=0)
        assert plain == "1.00 (1.00 to 1.00)"
        assert float(larger.split()[0]) < 0.9


def test_markdown_and_json_hold_every_cell(counted):
    text = paper_pages.markdown([counted["3"], counted["6"]])
    for row in (*TABLES["3"].rows, *TABLES["6"].rows):
        assert all(value in text for value in row.printed.values())
    assert "Of 24 cells counted by the authors, 24 agree, 1 of them cut instead of rounded." in text
    assert "ecanet train folder:PATH --model resnet50 --attention eca --out runs/resnet50-eca" in text
    content = json.loads(paper_pages.to_json([counted["3"]]))
    first = content["tables"][0]["rows"][0]
    assert first["cells"]["#Param"] == {"printed": "24.37M", "here": "", "agrees": True}
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]


def test_every_footnote_is_used_and_every_mark_has_one():
    marks = {mark for table in TABLES.values() for row in table.rows for mark in row.notes}
    assert marks == set(FOOTNOTES)


def test_pictures():
    for png in (paper_pages.figure_1(), paper_pages.figure_4()):
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no table '7'; .*poster"):
        paper.run("7")
    with pytest.raises(ConfigError, match="cannot measure 'flop'; did you mean 'flops'"):
        paper.run("3", measure=["flop"])
    with pytest.raises(DataError, match="no such folder"):
        paper.run("3", measure=["accuracy"], data=tmp_path / "none", weights=tmp_path)
