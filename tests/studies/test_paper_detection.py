"""Tables 5 and 6: detectors counted as the paper counts them, commands that train them, and AP from checkpoints."""

import json
import shlex
from dataclasses import asdict

import pytest
import torch
from torch import nn

from ecanet import training
from ecanet.data.scenes import SceneConfig, make_scenes
from ecanet.errors import CheckpointError, DataError
from ecanet.recipes import DetectorConfig, ModelConfig, with_settings
from ecanet.studies.paper import pages, runs, tables
from ecanet.studies.paper.detection import count_detector, count_operations
from ecanet.studies.paper.printed import TABLES
from ecanet.studies.paper.rows import Row, Table, backbone_of, name_checkpoint

DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet")
STAGES = ((256, 200 * 320), (512, 100 * 160), (1024, 50 * 80), (2048, 25 * 40))
"""Channels and positions of a ResNet's stages at 1280 x 800."""
BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


AP_BOXES = """
    Faster R-CNN, ResNet-50 | 36.4 58.2 39.2 21.8 40.0 46.2
    Faster R-CNN, R-50 + SE | 37.7 60.1 40.9 22.9 41.9 48.2
    Faster R-CNN, R-50 + ECA | 38.0 60.6 40.9 23.4 42.1 48.0
    Faster R-CNN, ResNet-101 | 38.7 60.6 41.9 22.7 43.2 50.4
    Faster R-CNN, R-101 + SE | 39.6 62.0 43.1 23.7 44.0 51.4
    Faster R-CNN, R-101 + ECA | 40.3 62.9 44.0 24.5 44.7 51.3
    Mask R-CNN, ResNet-50 | 37.2 58.9 40.3 22.2 40.7 48.0
    Mask R-CNN, R-50 + SE | 38.7 60.9 42.1 23.4 42.7 50.0
    Mask R-CNN, R-50 + 1 NL | 38.0 59.8 41.0 N/A N/A N/A
    Mask R-CNN, R-50 + GC | 39.4 61.6 42.4 N/A N/A N/A
    Mask R-CNN, R-50 + ECA | 39.0 61.3 42.1 24.2 42.8 49.9
    Mask R-CNN, ResNet-101 | 39.4 60.9 43.3 23.0 43.7 51.4
    Mask R-CNN, R-101 + SE | 40.7 62.5 44.3 23.9 45.2 52.8
    Mask R-CNN, R-101 + ECA | 41.3 63.1 44.8 25.1 45.8 52.9
    RetinaNet, ResNet-50 | 35.6 55.5 38.2 20.0 39.6 46.8
    RetinaNet, R-50 + SE | 37.1 57.2 39.9 21.2 40.7 49.3
    RetinaNet, R-50 + ECA | 37.3 57.7 39.6 21.9 41.3 48.9
    RetinaNet, ResNet-101 | 37.7 57.5 40.4 21.1 42.2 49.5
    RetinaNet, R-101 + SE | 38.7 59.1 41.6 22.1 43.1 50.9
    RetinaNet, R-101 + ECA | 39.1 59.9 41.8 22.8 43.4 50.6
"""
AP_MASKS = """
    ResNet-50 | 34.1 55.5 36.2 16.1 36.7 50.0
    R-50 + SE | 35.4 57.4 37.8 17.1 38.6 51.8
    R-50 + 1 NL | 34.7 56.7 36.6 N/A N/A N/A
    R-50 + GC | 35.7 58.4 37.6 N/A N/A N/A
    R-50 + ECA | 35.6 58.1 37.7 17.6 39.0 51.8
    ResNet-101 | 35.9 57.7 38.4 16.8 39.1 53.6
    R-101 + SE | 36.8 59.3 39.2 17.2 40.3 53.6
    R-101 + ECA | 37.4 59.9 39.8 18.1 41.1 54.1
"""
"""AP, AP50, AP75, AP_S, AP_M and AP_L of Tables 5 and 6, copied from the paper a second time, apart from the rows."""


@pytest.fixture(scope="module")
def table_5():
    return tables.run("5")[0]


@pytest.mark.slow
def test_every_cell_the_authors_counted_is_reproduced(table_5):
    own = [cells for row, cells in zip(table_5.table.rows, table_5.cells, strict=True) if row.own]
    assert len(own) == 18
    assert all(cells[column].agrees and not cells[column].here for cells in own for column in ("#Param", "GFLOPs"))
    assert "Of 36 cells counted by the authors, 36 agree." in pages.to_markdown([table_5])


@pytest.mark.slow
def test_rows_copied_from_another_paper_show_our_count(table_5):
    copied = {r.printed["Method"]: c for r, c in zip(table_5.table.rows, table_5.cells, strict=True) if not r.own}
    assert copied.keys() == {"R-50 + 1 NL", "R-50 + GC"}
    # GCNet's paper counts the frozen parameters too
    assert str(copied["R-50 + 1 NL"]["#Param"]) == "46.50M (here 46.27M; 46.50M with the frozen ones)"
    assert str(copied["R-50 + 1 NL"]["GFLOPs"]) == "288.70 (here 283.96; by the same rules)"


def added_operations(model: ModelConfig, detector: DetectorConfig) -> int:
    plain = ModelConfig(name=model.name, attention="none")
    return count_detector(model, detector).operations - count_detector(plain, detector).operations


@pytest.mark.parametrize(
    ("backbone", "printed", "detector"),
    [
        # the deep backbone is the same in each detector
        pytest.param(*row, detector, marks=[pytest.mark.slow] * (row[0] == "resnet101" and at > 0))
        for row in (("resnet50", "0.11"), ("resnet101", "0.18"))
        for at, detector in enumerate(DETECTORS)
    ],
)
def test_eca_adds_its_pools_and_next_to_nothing(detector, backbone, printed):
    """The expected number, by hand: every element that is pooled, and k products for each channel."""
    eca = ModelConfig(name=detector, attention="eca", kernel_sizes=(3, 5, 5, 7))
    added = added_operations(eca, DetectorConfig(backbone=backbone))
    parts = zip(BLOCKS[backbone], STAGES, (3, 5, 5, 7), strict=True)
    assert added == sum(blocks * (channels * positions + channels * k) for blocks, (channels, positions), k in parts)
    assert f"{added / 1e9:.2f}" == printed


def test_se_adds_pools_two_layers_and_a_relu():
    added = added_operations(ModelConfig(name="retinanet", attention="se"), DetectorConfig(backbone="resnet50"))
    parts = zip(BLOCKS["resnet50"], STAGES, strict=True)
    assert added == sum(n * (c * at + 2 * c * c // 16 + c // 16) for n, (c, at) in parts)


def test_rules_of_the_counter():
    x, out = torch.empty(2, 4, 6, 6), torch.empty(2, 8, 3, 3)
    assert count_operations(nn.Conv2d(4, 8, 3, 2, 1), x, out) == 2 * 9 * 8 * (9 * 4 + 1)
    assert count_operations(nn.Conv2d(4, 8, 3, 2, 1, bias=False), x, out) == 2 * 9 * 8 * 9 * 4
    assert count_operations(nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), x, out) == 2 * 9 * 8 * 9 * 2
    assert count_operations(nn.BatchNorm2d(4), x, x) == 2 * x.numel()
    assert count_operations(nn.MaxPool2d(2), x, torch.empty(2, 4, 3, 3)) == x.numel()
    assert count_operations(nn.Linear(5, 7), torch.empty(3, 5), torch.empty(3, 7)) == 3 * 35
    assert count_operations(nn.Sigmoid(), x, x) == 0


@pytest.mark.parametrize("name", ["5", "6"])
def test_every_command_describes_its_rows_network(name, monkeypatch):
    """Each line, parsed by the command line itself; a backbone's line writes what its detector's line reads."""
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
        assert row.detector is not None
        lines = runs.write_command(row.model, row.detector)
        assert lines is not None
        for line in lines.splitlines():
            with pytest.raises(RanError):
                cli.app(shlex.split(line)[1:], standalone_mode=False)
        recipe, folder = recipes[-1]
        assert (recipe.name, recipe.epochs, recipe.data.name) == ("coco_1x", 12, "coco:PATH")
        assert recipe.model.but(weights=None) == row.model
        assert recipe.detector == row.detector
        assert folder.name == name_checkpoint(row.model, row.detector)
        trains_backbone = row.model.attention in ("se", "eca")
        assert recipe.detector.freeze_attention == trains_backbone
        if not trains_backbone:
            assert recipe.model.weights == "default"
            continue
        backbone, backbone_folder = recipes[-2]
        assert recipe.model.weights == f"{backbone_folder}/checkpoints/best.ckpt"
        assert backbone.data.name == "folder:IMAGENET"
        assert backbone.model == backbone_of(row.model, row.detector)


@pytest.mark.parametrize(("name", "text"), [("5", AP_BOXES), ("6", AP_MASKS)])
def test_every_ap_is_the_papers(name, text):
    copied = dict(line.strip().split(" | ") for line in text.strip().splitlines())
    printed = {
        ", ".join(row.printed[c] for c in ("Detector", "Method") if c in row.printed): " ".join(
            row.printed[column] for column in runs.PRECISIONS
        )
        for row in TABLES[name].rows
    }
    assert printed == copied


# AP


MODEL = ModelConfig(name="mask_rcnn", attention="eca", kernel_sizes="official")
DETECTOR = DetectorConfig(backbone="resnet20")
NAME = "mask_rcnn-resnet20-eca"


def small_tables(*models: ModelConfig) -> list[Table]:
    """Tables 5 and 6 with one row for each model, in which every AP is printed as 36.4."""
    columns = tuple(runs.PRECISIONS)
    printed = dict.fromkeys(columns, "36.4")
    rows = tuple(Row(printed=printed, model=model, detector=DETECTOR, own=True) for model in models)
    return [Table(name=name, title="small", columns=columns, rows=rows) for name in ("5", "6")]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_scenes(SceneConfig(train=1, held_out=3), tmp_path_factory.mktemp("scenes"))


def save_run(path, **settings):
    """Save the checkpoint of a run of a small, untrained Mask R-CNN."""
    from ecanet.data.sources import DataSpec
    from ecanet.recipes import find, to_dict
    from ecanet.training.tasks import build

    recipe = with_settings(find("scenes"), {"detector.backbone": "resnet20", **settings})
    spec = DataSpec(class_names=tuple("0123456789"), channels=3, size=128, mean=(0.5,) * 3, std=(0.2,) * 3)
    state = build(recipe, spec).state_dict()
    torch.save({"state_dict": state, "ecanet": {"recipe": to_dict(recipe), "spec": asdict(spec)}}, path)


def test_ap_is_that_of_the_checkpoint_in_the_folder(tmp_path, coco, monkeypatch):
    """The real evaluation of a real checkpoint, with made answers: the true boxes, and masks moved by one pixel."""
    from ecanet.training.tasks import Detection

    save_run(tmp_path / f"{NAME}.ckpt")

    def answer(self, batch, batch_idx):
        answers = [
            {
                "boxes": target["boxes"],
                "labels": target["labels"],
                "scores": torch.ones(len(target["labels"])),
                "masks": target["masks"][:, None].roll(1, -1),
            }
            for target in batch[1]
        ]
        self.outcome.add(*batch, answers)

    monkeypatch.setattr(Detection, "validation_step", answer)
    other = MODEL.but(name="retinanet")
    boxes, masks = (
        tables.measure_table(table, ["accuracy"], coco, tmp_path, "cpu").cells for table in small_tables(other, MODEL)
    )
    assert str(boxes[0]["AP"]) == "36.4"
    assert str(boxes[1]["AP"]) == "36.4 (here 100.0)"
    assert 0 < float(masks[1]["AP"].here) < 100
    assert float(masks[1]["AP"].here) < float(masks[1]["AP50"].here)
    found = json.loads((tmp_path / f"{NAME}-results" / "bbox.json").read_text())
    assert len(found) == len(json.loads((tmp_path / f"{NAME}-results" / "segm.json").read_text())) > 0


@pytest.mark.slow
def test_ap_of_an_untrained_detector(tmp_path, coco):
    save_run(tmp_path / f"{NAME}.ckpt")
    measured = tables.measure_table(small_tables(MODEL)[0], ["accuracy"], coco, tmp_path, "cpu")
    assert float(measured.cells[0]["AP"].here) < 5


def test_columns_of_both_tables(tmp_path, coco, monkeypatch):
    save_run(tmp_path / f"{NAME}.ckpt")
    figures = {"AP": 0.3642, "AP50": 0.5, "AP75": 0.25, "APS": 0.125, "APM": 0.4, "APL": -1.0}
    metrics = figures | {f"mask_{name}": value / 2 for name, value in figures.items()}
    calls = []

    def evaluate(checkpoint, *, model, data_name):
        calls.append((checkpoint.name, model.name, model.attention, data_name))
        return metrics

    monkeypatch.setattr(training, "evaluate", evaluate)
    boxes, masks = (
        tables.measure_table(table, ["accuracy"], coco, tmp_path, "cpu").cells[0] for table in small_tables(MODEL)
    )
    assert calls == [(f"{NAME}.ckpt", "mask_rcnn", "eca", f"coco:{coco}")] * 2
    assert [str(cell) for cell in boxes.values()] == [
        "36.4 ✓",
        "36.4 (here 50.0)",
        "36.4 (here 25.0)",
        "36.4 (here 12.5)",
        "36.4 (here 40.0)",
        "36.4",  # no object is large
    ]
    assert str(masks["AP50"]) == "36.4 (here 25.0)"


def test_a_run_of_another_detector_is_refused(tmp_path, coco):
    other = DetectorConfig(backbone="resnet50")
    path = tmp_path / "mask_rcnn-resnet50-eca.ckpt"
    save_run(path)
    with pytest.raises(CheckpointError, match="trained mask_rcnn over resnet20, but its name says .* resnet50"):
        runs.evaluate_checkpoint(path, MODEL, other, coco)
    torch.save({"conv1.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not the checkpoint of a run; give the folder of a detector's run"):
        runs.evaluate_checkpoint(path, MODEL, other, coco)


def test_each_table_needs_its_own_data(tmp_path, coco):
    with pytest.raises(DataError, match="Table 5 needs COCO's folder, with annotations/instances_val2017.json"):
        tables.run("5", measure=["accuracy"], data=tmp_path, weights=tmp_path)
    with pytest.raises(DataError, match="needs ImageNet's"):
        tables.run("3", measure=["accuracy"], data=coco, weights=tmp_path)
    remarks = {m.table.name: m.remarks for m in tables.run(measure=["accuracy"], data=coco, weights=tmp_path)}
    assert "needs ImageNet's" in remarks["3"][0]
    assert remarks["5"] == remarks["6"] == remarks["1"] == []
    assert tables.run("6")[0].remarks == ["AP is as printed; --measure accuracy measures it."]
