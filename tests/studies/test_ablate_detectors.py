"""Ablations of detectors, and the choice of the larger control."""

import json
import math

import pytest

from ecanet import recipes
from ecanet.data.scenes import SceneConfig
from ecanet.errors import ConfigError
from ecanet.recipes import with_settings
from ecanet.studies.ablate import comparison, controls, pages
from ecanet.studies.ablate.grid import Ablation
from ecanet.studies.ablate.metrics import BOX_AP, find_metric
from ecanet.studies.ablate.variants import Variant, plan
from ecanet.studies.cost import Cost

SCENES = recipes.find("scenes")
COST = Cost(parameters=10, attention_parameters=0, macs=1, bytes=40, operations=1, operations_2020=1)


@pytest.fixture
def few_scenes(monkeypatch, tmp_path):
    """Return the settings of eight small scenes in a folder of the test."""
    few = SceneConfig(train=8, held_out=4)
    monkeypatch.setattr("ecanet.data.boxes.SceneConfig", lambda **_: few)
    return {"data.root": str(tmp_path / "scenes"), "data.batch_size": 4}


def compare(metrics):
    """Return the comparison of arms with these metrics by seed: the arms' names and their metrics."""
    arms = [Variant(name=name, recipe=SCENES, cost=COST) for name in metrics]
    runs = {
        (name, seed): {"metrics": one, "seconds": 1.0}
        for name, runs in metrics.items()
        for seed, one in enumerate(runs)
    }
    return comparison.compare(arms, runs, seeds=len(metrics["none"]), metric=find_metric(SCENES))


def test_detectors_are_compared_by_box_ap():
    """Three seeds: t(0.975, 2) = 4.302653; the paired differences are 0.02, 0.02 and 0.05."""
    plain, gated = (0.50, 0.60, 0.55), (0.52, 0.62, 0.60)
    wrong = {"top1": 99.0, "AP50": 0.9}
    none, eca = compare(
        {
            "none": [{"AP": value, "mask_AP": value / 2, **wrong} for value in plain],
            "eca": [{"AP": value, "mask_AP": value / 4, **wrong} for value in gated],
        }
    )
    assert (none.score.mean, eca.score.mean) == pytest.approx((0.55, 0.58))
    assert eca.difference.mean == pytest.approx(0.03)
    assert eca.difference.half == pytest.approx(4.302653 * math.sqrt(0.0003) / math.sqrt(3), rel=1e-6)
    assert eca.significant is False  # 0.03 +- 0.043
    assert eca.also["mask_AP"].mean == pytest.approx(0.145)
    done = Ablation(recipe=SCENES, folder=None, seeds=[0, 1, 2], results=[none, eca])
    table = pages.to_markdown(done).splitlines()
    assert "| box AP | paired difference" in table[0]
    assert table[0].endswith("| mask AP | seconds |")
    assert "| +0.030 (-0.013 to +0.073) | no | 0.145 (" in table[3]
    assert "COCO's average precision" in table[5]
    row = json.loads(pages.to_json(done))["rows"][1]
    assert row["AP_by_seed"] == {"0": 0.52, "1": 0.62, "2": 0.6}


def test_without_masks_there_is_no_column_for_them():
    arms = {"none": [{"AP": 0.5}, {"AP": 0.6}], "eca": [{"AP": 0.5}, {"AP": 0.7, "mask_AP": 0.3}]}
    assert all(not result.also for result in compare(arms))
    assert BOX_AP.also


def test_the_arms_of_a_detector(few_scenes):
    lines = []
    rows = plan(with_settings(SCENES, few_scenes), ["eca-random", "larger", "se", "eca-adaptive"], lines.append)
    assert [row.name for row in rows] == ["none", "eca-adaptive", "se", "larger"]
    assert lines == ["eca-random is the same network as eca-adaptive here: one row"]
    plain, eca, se, larger = rows
    assert eca.cost.parameters - plain.cost.parameters == 9 * 3  # the third stage of resnet20 and those before it
    assert se.model.options == {"reduction": 4}
    assert larger.recipe.detector.backbone == "resnet56"
    assert larger.recipe.detector.but(backbone="resnet20") == plain.recipe.detector
    assert larger.label == "larger (plain mask_rcnn over resnet56, control)"
    assert larger.cost.macs > 1.2 * plain.cost.macs > 1e8


@pytest.mark.slow
def test_ablate_compares_two_detectors_with_two_seeds(ecanet, few_scenes, tmp_path):
    settings = [f"--set={key}={value}" for key, value in few_scenes.items()]
    command = ["ablate", "scenes", "--model", "mask_rcnn", "--variants", "eca-adaptive,larger", "--seeds", 2]
    command += ["--epochs", 1, "--out", "out", *settings]
    code, out, err = ecanet(*command)
    assert (code, err) == (0, "")
    assert out.count(": box AP 0.") == 6
    assert "| mask AP |" in out
    assert "larger (plain mask_rcnn over resnet56, control)" in out
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["none", "eca-adaptive", "larger"]
    for row in rows:
        runs = [tmp_path / "out" / "cells" / f"{row['variant']}-seed{seed}" / "metrics.json" for seed in (0, 1)]
        metrics = [json.loads(path.read_text())["metrics"] for path in runs]
        assert list(row["AP_by_seed"].values()) == [each["AP"] for each in metrics]
        assert row["mask_AP"]["mean"] == pytest.approx(sum(each["mask_AP"] for each in metrics) / 2)
    assert "box AP" in (tmp_path / "out" / "ablation.html").read_text()
    assert "6 of them finished" in ecanet(*command)[1]


# the larger control


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("resnet8", "resnet14"),
        ("resnet34", "resnet50"),
        ("mobilenet_v2", None),
        ("torchvision:resnet18", "torchvision:resnet34"),
        ("torchvision:regnet_y_400mf", "torchvision:regnet_y_800mf"),
        ("torchvision:regnet_x_1_6gf", "torchvision:regnet_x_3_2gf"),
        ("torchvision:efficientnet_v2_s", "torchvision:efficientnet_v2_m"),
        ("torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_large"),
        ("torchvision:mobilenet_v2", None),  # the 2 is a version
        ("torchvision:squeezenet1_1", None),
        ("torchvision:resnext50_32x4d", None),  # torchvision's resnext101 is wider, too
        ("timm:resnet26d", "timm:resnet50d"),  # resnet34d has no bottlenecks
        ("timm:convnext_atto", "timm:convnext_femto"),
        ("timm:cspnext_s", "timm:cspnext_m"),  # the last s, not the first
        ("timm:resnet50.a1_in1k", "timm:resnet101"),
        ("timm:regnety_004", "timm:regnety_006"),
        ("mine.py:make", None),
    ],
)
def test_the_next_of_a_family(name, larger):
    assert controls.find_larger(name) == larger


def test_how_the_control_was_chosen_is_said():
    assert controls.choose_larger("timm:resnet26d", None, "default") == ("timm:resnet50d", "next in timm's list")
    assert controls.choose_larger("resnet20", None, None) == ("resnet56", "")
    assert controls.choose_larger("resnet20", "torchvision:resnet50", None) == ("torchvision:resnet50", "named")
    recipe = recipes.find("quickstart")
    (_, larger) = plan(recipe, ["larger=torchvision:resnet18"], lambda line: None)
    assert larger.label == "larger (plain torchvision:resnet18, control: named)"
    assert larger.model.weights is None


@pytest.mark.parametrize(
    ("base", "names", "weights", "message"),
    [
        ("torchvision:mobilenet_v2", ["larger"], None, "name one, such as larger=torchvision:resnet50"),
        ("mobilenet_v2", ["larger"], None, "name one, such as larger=resnet50"),
        ("resnet20", ["larger=resnet8"], None, "larger=resnet8 is not larger: 77,"),
        ("resnet20", ["se=resnet8"], None, "only the larger control names a network"),
        ("resnet20", ["larger="], None, "only the larger control names a network"),
        ("resnet20", ["larger=resnet57"], None, "unknown model 'resnet57'"),
        ("resnet20", ["larger"], "some.pth", "cannot begin with some.pth, which is for resnet20"),
        ("resnet20", ["larger=resnet56"], "some.pth", "cannot begin with some.pth, which is for resnet20"),
        ("torchvision:resnet18", ["larger=mine.py:make"], "default", "your own network has no default weights"),
    ],
)
def test_mistakes_about_the_control_are_one_line(base, names, weights, message):
    recipe = with_settings(recipes.find("quickstart"), {"model.name": base, "model.weights": weights})
    with pytest.raises(ConfigError, match=message) as caught:
        plan(recipe, names, lambda line: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("eca", "'eca-adaptive'"),
        ("bigger", "'larger'"),
        ("bigger=timm:resnet50d", "'larger'"),
        ("plain", "'none'"),
        ("largr", "'larger'"),
    ],
)
def test_names_that_one_could_expect_say_what_is_meant(ecanet, given, meant):
    code, out, err = ecanet("ablate", "digits", "--variants", f"none,{given},se")
    assert (code, out) == (2, "")
    assert err == f"ecanet: there is no variant {given.partition('=')[0]!r}; did you mean {meant}?\n"
