"""Tables 5 and 6: detectors counted as the paper counts them, commands that train them, and AP from checkpoints."""

import json
import shlex
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from ecanet import training
from ecanet.data.scenes import SceneConfig, scenes
from ecanet.errors import CheckpointError, DataError
from ecanet.recipes.config import with_settings
from ecanet.studies.paper import pages as paper_pages
from ecanet.studies.paper import runs as paper_runs
from ecanet.studies.paper import tables as paper
from ecanet.studies.paper.detection import detector_cost, operations
from ecanet.studies.paper.rows import TABLES, Network, Row, Table

DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet")
STAGES = ((256, 200 * 320), (512, 100 * 160), (1024, 50 * 80), (2048, 25 * 40))
"""Channels and positions of a ResNet's stages at 1280 x 800."""
BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


@pytest.fixture(scope="module")
def table_5():
    return paper.run("5")[0]


def test_every_cell_the_authors_counted_is_reproduced(table_5):
    own = [cells for row, cells in zip(table_5.table.rows, table_5.cells, strict=True) if row.own]
    assert len(own) == 18
    assert all(cells[column].agrees and not cells[column].here for cells in own for column in ("#Param", "GFLOPs"))
    assert "Of 36 cells counted by the authors, 36 agree." in paper_pages.markdown([table_5])


def test_rows_of_another_paper_show_our_count(table_5):
    copied = {r.printed["Method"]: c for r, c in zip(table_5.table.rows, table_5.cells, strict=True) if not r.own}
    assert copied.keys() == {"R-50 + 1 NL", "R-50 + GC"}
    # GCNet's paper counts the frozen parameters too
    assert str(copied["R-50 + 1 NL"]["#Param"]) == "46.50M (here 46.27M; 46.50M with the frozen ones)"
    assert str(copied["R-50 + 1 NL"]["GFLOPs"]) == "288.70 (here 283.96; by the same rules)"


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("backbone", "printed"), [("resnet50", "0.11"), ("resnet101", "0.18")])
def test_eca_adds_its_pools_and_next_to_nothing(detector, backbone, printed):
    """By hand: every element that is pooled, and k products a channel."""
    plain = Network(name=backbone, detector=detector)
    eca = replace(plain, attention="eca", kernel_sizes=(3, 5, 5, 7))
    added = detector_cost(eca).operations - detector_cost(plain).operations
    parts = zip(BLOCKS[backbone], STAGES, (3, 5, 5, 7), strict=True)
    assert added == sum(blocks * (channels * positions + channels * k) for blocks, (channels, positions), k in parts)
    assert f"{added / 1e9:.2f}" == printed


def test_se_adds_pools_two_layers_and_a_relu():
    plain = Network(name="resnet50", detector="retinanet")
    se = replace(plain, attention="se")
    added = detector_cost(se).operations - detector_cost(plain).operations
    parts = zip(BLOCKS["resnet50"], STAGES, strict=True)
    assert added == sum(n * (c * at + 2 * c * c // 16 + c // 16) for n, (c, at) in parts)


def test_rules_of_the_counter():
    x, out = torch.empty(2, 4, 6, 6), torch.empty(2, 8, 3, 3)
    assert operations(nn.Conv2d(4, 8, 3, 2, 1), x, out) == 2 * 9 * 8 * (9 * 4 + 1)
    assert operations(nn.Conv2d(4, 8, 3, 2, 1, bias=False), x, out) == 2 * 9 * 8 * 9 * 4
    assert operations(nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), x, out) == 2 * 9 * 8 * 9 * 2
    assert operations(nn.BatchNorm2d(4), x, x) == 2 * x.numel()
    assert operations(nn.MaxPool2d(2), x, torch.empty(2, 4, 3, 3)) == x.numel()
    assert operations(nn.Linear(5, 7), torch.empty(3, 5), torch.empty(3, 7)) == 3 * 35
    assert operations(nn.Sigmoid(), x, x) == 0


@pytest.mark.parametrize("name", ["5", "6"])
def test_every_command_describes_its_rows_network(name, monkeypatch):
    """Each line, parsed by the command line itself; a backbone's line writes what its detector's line reads."""
    from ecanet import cli, training

    ran = []

    class RanError(Exception):
        pass

    def record(recipe, **kwargs):
        ran.append((recipe, kwargs["folder"]))
        raise RanError

    monkeypatch.setattr(training, "run", record)
    for row in TABLES[name].rows:
        network = row.network
        assert network is not None
        lines = paper.command(network)
        assert lines is not None
        for line in lines.splitlines():
            with pytest.raises(RanError):
                cli.app(shlex.split(line)[1:], standalone_mode=False)
        recipe, folder = ran[-1]
        model = recipe.model
        assert (recipe.name, recipe.epochs, recipe.data.name) == ("coco_1x", 12, "coco:PATH")
        assert (model.name, recipe.detector.backbone) == (network.detector, network.name)
        assert (model.attention, model.kernel_sizes) == (network.attention, network.kernel_sizes)
        assert folder.name == network.key
        gated = network.attention in ("se", "eca")
        assert recipe.detector.freeze_attention == gated
        if not gated:
            assert model.weights == "torchvision"
            continue
        backbone, made = ran[-2]
        assert model.weights == f"{made}/checkpoints/best.ckpt"
        assert backbone.data.name == "folder:IMAGENET"
        assert backbone.model == model.but(name=network.name, weights=None)


# AP


def row(network: Network) -> Row:
    return Row(network=network, printed=dict.fromkeys(paper_runs.PRECISIONS, "36.4"), own=True)


def tables(*networks: Network) -> list[Table]:
    columns = tuple(paper_runs.PRECISIONS)
    return [Table(name=n, title="tiny", columns=columns, rows=tuple(map(row, networks))) for n in ("5", "6")]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return scenes(SceneConfig(train=1, held_out=3), tmp_path_factory.mktemp("scenes"))


def save_run(path, **settings):
    """The checkpoint of a run of a small Mask R-CNN that has learnt nothing."""
    from ecanet.data.sources import DataSpec
    from ecanet.recipes import find
    from ecanet.recipes.config import to_dict
    from ecanet.training.tasks import build

    recipe = with_settings(find("scenes"), {"detector.backbone": "resnet20", **settings})
    spec = DataSpec(class_names=tuple("0123456789"), channels=3, size=128, mean=(0.5,) * 3, std=(0.2,) * 3)
    state = build(recipe, spec).state_dict()
    torch.save({"state_dict": state, "ecanet": {"recipe": to_dict(recipe), "spec": asdict(spec)}}, path)


def test_ap_is_that_of_the_checkpoint_in_the_folder(tmp_path, coco, monkeypatch):
    """The real evaluation of a real checkpoint, but for what it finds: the true boxes, and masks a little off."""
    from ecanet.training.tasks import Detection

    network = Network(name="resnet20", detector="mask_rcnn", attention="eca")
    save_run(tmp_path / f"{network.key}.ckpt")

    def told(self, batch, batch_idx):
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

    monkeypatch.setattr(Detection, "validation_step", told)
    other = replace(network, detector="retinanet")
    boxes, masks = (
        paper._measured(table, ["accuracy"], coco, tmp_path, "cpu").cells for table in tables(other, network)
    )
    assert str(boxes[0]["AP"]) == "36.4"
    assert str(boxes[1]["AP"]) == "36.4 (here 100.0)"
    assert 0 < float(masks[1]["AP"].here) < 100
    assert float(masks[1]["AP"].here) < float(masks[1]["AP50"].here)
    found = json.loads((tmp_path / f"{network.key}-results" / "bbox.json").read_text())
    assert len(found) == len(json.loads((tmp_path / f"{network.key}-results" / "segm.json").read_text())) > 0


@pytest.mark.slow
def test_ap_of_a_detector_that_has_learnt_nothing(tmp_path, coco):
    network = Network(name="resnet20", detector="mask_rcnn", attention="eca")
    save_run(tmp_path / f"{network.key}.ckpt")
    measured = paper._measured(tables(network)[0], ["accuracy"], coco, tmp_path, "cpu")
    assert float(measured.cells[0]["AP"].here) < 5


def test_columns_of_both_tables(tmp_path, coco, monkeypatch):
    network = Network(name="resnet20", detector="mask_rcnn", attention="eca")
    save_run(tmp_path / f"{network.key}.ckpt")
    figures = {"AP": 0.3642, "AP50": 0.5, "AP75": 0.25, "APS": 0.125, "APM": 0.4, "APL": -1.0}
    metrics = figures | {f"mask_{name}": value / 2 for name, value in figures.items()}
    asked = []

    def evaluate(checkpoint, *, model, data_name):
        asked.append((checkpoint.name, model.name, model.attention, data_name))
        return metrics

    monkeypatch.setattr(training, "evaluate", evaluate)
    boxes, masks = (paper._measured(table, ["accuracy"], coco, tmp_path, "cpu").cells[0] for table in tables(network))
    assert asked == [(f"{network.key}.ckpt", "mask_rcnn", "eca", f"coco:{coco}")] * 2
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
    network = Network(name="resnet50", detector="mask_rcnn", attention="eca")
    path = tmp_path / f"{network.key}.ckpt"
    save_run(path)
    with pytest.raises(CheckpointError, match="mask_rcnn over resnet20, and its name is that of mask_rcnn over resnet"):
        paper_runs.scores(network, path, coco)
    torch.save({"conv1.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="no run's checkpoint; give the folder"):
        paper_runs.scores(network, path, coco)


def test_each_table_asks_for_its_own_data(tmp_path, coco):
    with pytest.raises(DataError, match="Table 5 needs COCO's folder, with annotations/instances_val2017.json"):
        paper.run("5", measure=["accuracy"], data=tmp_path, weights=tmp_path)
    with pytest.raises(DataError, match="needs ImageNet's"):
        paper.run("3", measure=["accuracy"], data=coco, weights=tmp_path)
    remarks = {m.table.name: m.remarks for m in paper.run(measure=["accuracy"], data=coco, weights=tmp_path)}
    assert "needs ImageNet's" in remarks["3"][0]
    assert remarks["5"] == remarks["6"] == remarks["1"] == []
    assert paper.run("6")[0].remarks == ["AP is as printed; --measure accuracy measures it."]
