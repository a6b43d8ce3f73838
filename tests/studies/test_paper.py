"""The paper's tables: the printed numbers, the counts beside them, footnotes, commands and accuracies."""

import json
import shlex

import pytest
import torch

import ecanet
from ecanet.attention import ATTENTIONS
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import ModelConfig
from ecanet.studies.paper import costs, pages, speed, tables
from ecanet.studies.paper.cells import Cell, compare_with_printed
from ecanet.studies.paper.printed import FOOTNOTES, TABLES
from ecanet.studies.paper.rows import name_checkpoint
from ecanet.studies.paper.runs import write_command

ACCURACIES = """
    2: Vanilla | 75.20 92.25
    2: SE | 76.71 93.38
    2: SE-Var1 | 76.00 92.90
    2: SE-Var2 | 77.07 93.31
    2: SE-Var3 | 77.42 93.64
    2: SE-GC1 | 76.95 93.47
    2: SE-GC2 | 76.98 93.31
    2: SE-GC3 | 76.96 93.38
    2: ECA-NS | 77.35 93.61
    2: ECA | 77.43 93.65
    3: ResNet, R-50 | 1024 1855 75.20 92.52
    3: SENet, R-50 | 759 1620 76.71 93.38
    3: CBAM, R-50 | 472 1213 77.34 93.69
    3: A2-Nets, R-50 | N/A N/A 77.00 93.50
    3: GCNet, R-50 | N/A N/A 77.70 93.66
    3: GSoP-Net1, R-50 | 596 1383 77.68 93.98
    3: AA-Net, R-50 | N/A N/A 77.70 93.80
    3: ECA-Net, R-50 | 785 1805 77.48 93.68
    3: ResNet, R-101 | 386 1174 76.83 93.48
    3: SENet, R-101 | 367 1044 77.62 93.93
    3: CBAM, R-101 | 270 635 78.49 94.31
    3: AA-Net, R-101 | N/A N/A 78.70 94.40
    3: ECA-Net, R-101 | 380 1089 78.65 94.34
    3: ResNet, R-152 | 281 815 77.58 93.66
    3: SENet, R-152 | 268 761 78.43 94.27
    3: ECA-Net, R-152 | 279 785 78.92 94.55
    3: MobileNetV2, MobileNetV2 | 711 2086 71.64 90.20
    3: SENet, MobileNetV2 | 671 2000 72.42 90.67
    3: ECA-Net, MobileNetV2 | 676 2010 72.56 90.81
    poster: ResNet, R-18 | 70.40 89.45
    poster: SENet, R-18 | 70.59 89.78
    poster: ECA-Net, R-18 | 70.78 89.92
    poster: ResNet, R-34 | 73.31 91.40
    poster: SENet, R-34 | 73.87 91.65
    poster: CBAM, R-34 | 74.01 91.76
    poster: ECA-Net, R-34 | 74.21 91.83
    4: ResNet-200 | 78.20 94.00
    4: Inception-v3 | 77.45 93.56
    4: ResNeXt-101 | 78.80 94.40
    4: DenseNet-264 (k=32) | 77.85 93.78
    4: DenseNet-161 (k=48) | 77.65 93.80
    4: ECA-Net50 | 77.48 93.68
    4: ECA-Net101 | 78.65 94.34
"""
"""Top-1 and Top-5 of the ImageNet tables, in Table 3 after the frames per second of training and inference.

They are copied from the paper a second time, apart from the rows.
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, tables.Measured]:
    # Counting Table 5 takes a while: test_paper_detection does it.
    return {name: tables.run(name, measure=["params", "flops"])[0] for name in TABLES if name not in ("5", "later")}


def cells(measured: tables.Measured, column: str, *, own: bool) -> list[Cell]:
    return [c[column] for row, c in zip(measured.table.rows, measured.cells, strict=True) if row.own is own]


@pytest.mark.slow
def test_every_cell_the_authors_counted_is_reproduced(counted):
    parameters = cells(counted["3"], "#Param", own=True) + cells(counted["poster"], "#Param", own=True)
    operations = cells(counted["3"], "FLOPs", own=True) + cells(counted["poster"], "FLOPs", own=True)
    assert (len(parameters), len(operations)) == (18, 18)
    assert all(cell.agrees and not cell.here for cell in parameters)
    assert [str(c) for c in operations if c.here] == ["319.9M ✓ (319.97 truncated)"]
    assert sum(bool(c.agrees and not c.here) for c in operations) == 17


def test_every_accuracy_and_speed_is_the_papers():
    copied = [line.strip() for line in ACCURACIES.strip().splitlines()]
    measured = ("Train FPS", "Infer FPS", "Top-1", "Top-5")
    printed = []
    for name in ("2", "3", "poster", "4"):
        for row in TABLES[name].rows:
            cells = dict(row.printed)
            method = (cells.get("Method") or cells["Model"]).removesuffix(" (ours)").removesuffix(" (r=8)")
            network = f"{method}, {cells['Backbone']}" if "Backbone" in cells else method
            printed.append(f"{name}: {network} | " + " ".join(cells[column] for column in measured if column in cells))
    assert printed == copied


@pytest.mark.slow
def test_the_module_column_of_table_2(counted):
    column = [found["#Param"] for found in counted["2"].cells]
    assert len(column) == 10
    assert all(cell.agrees for cell in column)


@pytest.mark.slow
def test_rows_copied_from_other_papers_show_our_count(counted):
    copied = [
        found for row, found in zip(counted["3"].table.rows, counted["3"].cells, strict=True) if "copied" in row.notes
    ]
    assert len(copied) == 5
    for found in copied:
        assert not found["#Param"].agrees
        assert "x 10^6" in str(found["#Param"])
    assert str(copied[0]["#Param"]) == "33.00M (here 31.37M; 32.90 x 10^6)"


@pytest.mark.slow
def test_three_other_networks_confirm_the_rules(counted):
    """Table 4's Inception-v3 and two DenseNets, by torchvision: parameters and operations to the printed digit."""
    rows = {row.printed["Model"]: found for row, found in zip(TABLES["4"].rows, counted["4"].cells, strict=True)}
    for model in ("Inception-v3", "DenseNet-264 (k=32)", "DenseNet-161 (k=48)"):
        assert rows[model]["#Param"].agrees
        assert rows[model]["FLOPs"].agrees
    assert not rows["ResNet-200"]["#Param"].agrees


@pytest.mark.parametrize(
    ("printed", "found", "own", "text"),
    [
        ("24.37M", 25_557_032, True, "24.37M ✓"),
        ("24.38M", 25_557_032, True, "24.38M (here 24.37M; today)"),
        ("3.85G", 4_142_000_000, True, "3.85G ✓ (3.858 truncated)"),
        ("3.85G", 4_142_000_000, False, "3.85G (here 3.86G; today)"),
        ("319.9M", 335_512_960, True, "319.9M ✓ (319.97 truncated)"),
        ("319.9M", 334_512_960, True, "319.9M (here 319.0M; today)"),
    ],
)
def test_comparison_to_the_printed_digit(printed, found, own, text):
    assert str(compare_with_printed(printed, found, "today", own=own)) == text


def test_a_module_with_wrong_parameters_disagrees():
    wrong = ModelConfig(name="resnet50", attention="se", options={"reduction": 8})
    cell = costs.check_module_parameters("2C²/r", wrong)
    assert not cell.agrees
    assert f"{2 * 1024**2 // 8:,} at C = 1024" in str(cell)


def test_the_later_modules_are_counted_in_their_papers_units():
    """SimAM's authors print 10^6 parameters; where nothing is printed stands what is found here."""
    rows = {(row.model.attention, row.model.name): row for row in TABLES["later"].rows}
    assert {attention for attention, _ in rows} == {"none", *list(ATTENTIONS)[-8:]}
    found = {key: costs.count_row(rows[key], ["params", "flops"]) for key in
             [("simam", "mobilenet_v2"), ("simam", "resnet50"), ("srm", "resnet50")]}  # fmt: skip
    assert [str(one["#Param"]) for one in found.values()] == [
        "3.50M ✓",
        "25.56M ✓",
        "N/A (here 25.62M)",
    ]
    assert str(found["simam", "resnet50"]["MACs"]) == "4.11G (here 4.09G; convolutions and linear layers)"
    assert str(found["srm", "resnet50"]["MACs"]) == "N/A (here 4.09G)"


@pytest.mark.parametrize("name", ["2", "3", "poster", "figure4", "later"])
def test_every_command_describes_its_rows_network(name, monkeypatch):
    """Each command, parsed by the command line itself, gives a recipe with exactly the row's network."""
    from ecanet import cli, training

    recipes = []

    class RanError(Exception):
        pass

    def record(recipe, **kwargs):
        recipes.append((recipe, kwargs["folder"]))
        raise RanError

    monkeypatch.setattr(training, "run", record)
    for row in TABLES[name].rows:
        assert row.model is not None
        line = write_command(row.model)
        assert line is not None
        with pytest.raises(RanError):
            cli.app(shlex.split(line)[1:], standalone_mode=False)
        recipe, folder = recipes[-1]
        assert recipe.model == row.model
        assert recipe.data.name == "folder:PATH"
        assert recipe.epochs == (400 if row.model.name == "mobilenet_v2" else 100)
        assert folder.name == name_checkpoint(row.model)
    assert len({str(folder) for _, folder in recipes}) == len(recipes)


def test_accuracy_is_evaluated_where_there_are_data_and_weights(tmp_path, monkeypatch):
    from ecanet import training

    calls = []

    def evaluate(checkpoint, *, model, data_name):
        calls.append((checkpoint.name, model.attention, data_name))
        return {"top1": 77.476, "top5": 93.62}

    monkeypatch.setattr(training, "evaluate", evaluate)
    for name in ("resnet50-eca.pth.tar", "resnet50-eca-3333.pth"):
        (tmp_path / name).touch()
    measured = tables.run("3", measure=["accuracy"], data=tmp_path, weights=tmp_path)[0]
    assert calls == [("resnet50-eca.pth.tar", "eca", f"folder:{tmp_path}")]
    assert str(measured.cells[7]["Top-1"]) == "77.48 ✓"
    assert str(measured.cells[7]["Top-5"]) == "93.68 (here 93.62)"
    assert str(measured.cells[0]["Top-1"]) == "75.20"
    assert "not measured" in pages.to_markdown(tables.run("3", measure=["accuracy"]))


@pytest.mark.slow
def test_accuracy_of_a_real_checkpoint(tmp_path):
    """An untrained ECA-ResNet-50, really evaluated on six images of two classes."""
    from PIL import Image

    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (240, 230), (80 * i, 10, 200)).save(folder / f"{i}.png")
    weights = tmp_path / "weights"
    weights.mkdir()
    model = ecanet.create_model("resnet50", kernel_sizes="official", num_classes=2)
    torch.save(model.state_dict(), weights / "resnet50-eca.pth")
    measured = tables.run("3", measure=["accuracy"], data=tmp_path / "data", weights=weights)[0]
    top1 = float(measured.cells[7]["Top-1"].here)
    assert any(abs(top1 - 100 * k / 6) < 0.01 for k in range(7))


def test_speed_is_a_share_of_the_plain_networks_rate():
    """Two networks, the second with four times the work: its share is well below one, the plain one's is one."""
    networks = [ModelConfig(name=name, attention="none") for name in ("resnet20", "resnet56")]
    train, infer = speed.time_networks(networks, "cpu", batch=2, side=16, rounds=3)
    for times in (train, infer):
        assert [len(t) for t in times] == [3, 3]
        plain, larger = speed.format_shares(times, plain=0)
        assert plain == "1.00 (1.00 to 1.00)"
        assert float(larger.split()[0]) < 0.9


@pytest.mark.slow
def test_markdown_and_json_hold_every_cell(counted):
    text = pages.to_markdown([counted["3"], counted["6"]])
    for row in (*TABLES["3"].rows, *TABLES["6"].rows):
        assert all(value in text for value in row.printed.values())
    assert "Of 24 cells counted by the authors, 24 agree, 1 of them truncated instead of rounded." in text
    command = (
        "ecanet train folder:PATH --model resnet50 --attention eca --kernel-sizes official --out runs/resnet50-eca"
    )
    assert f"    {command}\n" in text
    content = json.loads(pages.to_json([counted["3"]]))
    first = content["tables"][0]["rows"][0]
    assert first["cells"]["#Param"] == {"printed": "24.37M", "here": "", "agrees": True}
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]


def test_every_footnote_is_used_and_every_mark_has_one():
    marks = {mark for table in TABLES.values() for row in table.rows for mark in row.notes}
    assert marks == set(FOOTNOTES)


def test_every_eca_row_names_its_kernel_sizes():
    """Neither the rows nor their commands depend on the default kernel sizes."""
    models = [row.model for table in TABLES.values() for row in table.rows if row.model is not None]
    # The paper calls its k adaptive, but trained with the kernel sizes of the released checkpoints.
    assert all(model.kernel_sizes != "adaptive" for model in models if model.attention.startswith("eca"))
    lines = [write_command(r.model, r.detector) for t in TABLES.values() for r in t.rows if r.model is not None]
    commands = [command for line in lines if line for command in line.splitlines()]
    with_kernel = [command for command in commands if " --attention eca" in command]
    assert len(with_kernel) >= 20
    assert all(" --kernel-sizes " in command for command in with_kernel)
    assert not any("--kernel-sizes" in command for command in commands if command not in with_kernel)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_footnote_numbers_of_a_row_lead_to_its_footnotes(name):
    """Read back from the Markdown: the numbers at the end of each row, and the numbered list below the table."""
    measured = tables.measure_table(TABLES[name], [], None, None, "cpu")
    lines = pages.to_markdown([measured]).splitlines()
    texts = dict(line.split(". ", 1) for line in lines if line.partition(".")[0].isdigit())
    rows = [line for line in lines if line.startswith("| ")][2:]
    for line, row in zip(rows, TABLES[name].rows, strict=True):
        numbers = line.split("|")[-2].split()
        assert [texts[number] for number in numbers] == [FOOTNOTES[note] for note in row.notes]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no table '7'; .*poster"):
        tables.run("7")
    with pytest.raises(ConfigError, match="cannot measure 'flop'; did you mean 'flops'"):
        tables.run("3", measure=["flop"])
    with pytest.raises(DataError, match="no such folder"):
        tables.run("3", measure=["accuracy"], data=tmp_path / "none", weights=tmp_path)
