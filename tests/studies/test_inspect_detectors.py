"""`ecanet inspect` on detectors: their gates over all images, alarms, the page, and what is for classifiers alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ecanet import attached
from ecanet.attention import ECA, SEVar2, record_gates
from ecanet.data import DataSpec
from ecanet.data.boxes import load_boxes
from ecanet.data.scenes import SceneConfig
from ecanet.errors import ConfigError
from ecanet.recipes import ModelConfig, find, with_settings
from ecanet.studies.gates import inspection, pages
from ecanet.training import build_detector


@pytest.fixture
def scenes(monkeypatch, tmp_path):
    """Return the folder of five held-out scenes, which are made when they are read."""
    few = SceneConfig(train=2, held_out=5)
    monkeypatch.setattr("ecanet.data.boxes.SceneConfig", lambda **_: few)
    return tmp_path / "scenes"


def save(path: Path, name: str, attention: str, scenes: Path) -> nn.Module:
    """Write the weights of a detector, whose gates are the identity but for the second, and return it."""
    recipe = find("scenes")
    images = load_boxes(recipe.data.but(root=str(scenes)), train=False)
    recipe = with_settings(recipe, {"model.name": name, "model.attention": attention, "detector.frozen_stages": 0})
    torch.manual_seed(0)
    network = build_detector(recipe, images.spec).model.eval()
    gates = [module for module in network.modules() if isinstance(module, ECA)]
    for at, gate in enumerate(gates):
        gate.neutralize()
        if at == 1:
            nn.init.normal_(gate.conv.weight, std=3)
    torch.save(network.state_dict(), path)
    return network


def test_our_detector_by_its_name(ecanet, scenes, tmp_path):
    """The mean and deviation of each gate over the images are those of the plain average; idle gates are named."""
    network = save(tmp_path / "weights.pt", "retinanet", "eca", scenes)
    arguments = ["--model", "retinanet", "--attention", "eca", "--data", "scenes", "--data-dir", scenes]
    code, out, err = ecanet("inspect", "weights.pt", *arguments, "--out", "page")
    assert (code, err) == (0, "")
    content = json.loads(Path("page/inspect.json").read_text())
    assert content["images"] == 5
    names = [f"backbone.body.layer{stage}.{block}.eca" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert [row["gate"] for row in content["gates"]] == names

    seen = {}
    for name in names:
        gate = network.get_submodule(name)
        gate.register_forward_pre_hook(lambda gate, args, name=name: seen.__setitem__(name, args[0].mean((2, 3))))
    data = load_boxes(find("scenes").data.but(root=str(scenes)), train=False)
    images = [data.held_out[at, False][0].float() / 255 for at in range(5)]
    with torch.no_grad():
        network(images)
        for row in content["gates"]:
            weights = network.get_submodule(row["gate"]).weigh(seen[row["gate"]])
            assert row["mean"] == pytest.approx(weights.mean(0).tolist(), abs=1e-5)
            assert row["deviation"] == pytest.approx(weights.std(0, correction=0).tolist(), abs=1e-5)
    assert {"inspect.html", "inspect.json", "weights.png", "spread.png", "kernels.png"} == {
        path.name for path in Path("page").iterdir()
    }
    alarms = [line for line in out.splitlines() if line.startswith("alarm: ") and "has not moved" in line]
    assert [line.split(": ")[1] for line in alarms] == [names[0], *names[2:]]
    page = Path("page/inspect.html").read_text()
    assert page.count("has not moved") == 8
    assert "5 held-out images of 10 classes" in page
    assert page.count("<svg") == 9 + 1 + 1
    assert "between classes" not in page.replace("the classes' means", "")
    assert page.count("<td data-name='spread: classes'>-</td>") == 9
    assert len(re.findall(r"│ +- +│ 0\.\d{3} +│", out)) == 9  # there is no spread between classes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_torchvisions_detectors_by_their_names(ecanet, scenes, tmp_path, name):
    network = save(tmp_path / "weights.pt", f"torchvision:{name}", "eca", scenes)
    arguments = ["--model", f"torchvision:{name}", "--attention", "eca", "--data", "scenes", "--data-dir", scenes]
    Path("page").mkdir()
    for old in ("inspect.json", "classes.png", "mine.png"):  # an earlier inspection's, and somebody else's
        Path("page", old).write_text("{}")
    code, out, err = ecanet("inspect", "weights.pt", *arguments, "--out", "page")
    assert (code, err) == (0, "")
    rows = json.loads(Path("page/inspect.json").read_text())["gates"]
    assert [row["gate"] for row in rows] == [site.name for site in attached(network)]
    assert out.count("has not moved") >= len(rows) - 1  # random features of an SSDlite vanish
    assert {path.name for path in Path("page").iterdir()} == {
        "inspect.html", "inspect.json", "weights.png", "spread.png", "kernels.png", "mine.png",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask_rcnn", "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_runs_of_both(ecanet, scenes, name):
    settings = ["--epochs", 1, "--set", "data.batch_size=2", "--set", "detector.frozen_stages=0", "--device", "cpu"]
    code, _, err = ecanet("train", "scenes", "--model", name, "--data-dir", scenes, *settings, "--out", "run")
    assert (code, err) == (0, "")
    code, _, err = ecanet("inspect", "run", "--out", "page")
    assert (code, err) == (0, "")
    assert json.loads(Path("page/inspect.json").read_text())["images"] == 5
    code, _, err = ecanet("inspect", "run", "--cam", "--out", "page")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--cam is for classifiers, and {name} is a detector" in err


@pytest.mark.parametrize("option", ["--classes", "--image", "--cam"])
def test_what_is_for_classifiers_is_refused_before_the_data_are_read(monkeypatch, option):
    monkeypatch.setattr(inspection, "build_data", lambda *args, **options: pytest.fail("read"))
    spec = DataSpec(class_names=("a", "b"), channels=3, size=64, mean=(0.5,) * 3, std=(0.2,) * 3)
    detector = type("Task", (inspection.Detection,), {"__init__": lambda self: nn.Module.__init__(self)})()
    detector.recipe, detector.spec, detector.model = find("scenes"), spec, nn.Sequential(ECA(4))
    monkeypatch.setattr(pages, "restore", lambda *args, **options: detector)
    value = {"--classes": {"classes": ["a"]}, "--image": {"image": "a.png"}, "--cam": {"cam": True}}[option]
    with pytest.raises(ConfigError, match=f"^{option} is for classifiers, and mask_rcnn is a detector: leave it out"):
        pages.run("run", "page", **value)


def test_a_gate_that_runs_for_each_region_counts_each_run():
    """Without labels, a gate may see another number of inputs than there are images."""
    model = nn.Sequential(nn.Upsample(scale_factor=2), SEVar2(4))
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, images):
            return self.inner(torch.cat([*images, *images]).view(-1, 4, 2, 2))

    (found,) = record_gates(Regions(), [(list(x), None), (list(x[:1]), None)], 1)
    assert found.counts.tolist() == [8]
    weights = model[1].weigh(torch.cat([x, x, x[:1], x[:1]]).mean((2, 3)))
    torch.testing.assert_close(found.mean, weights.mean(0))


def test_a_plain_detector_has_nothing_to_inspect(scenes, tmp_path):
    recipe = with_settings(find("scenes"), {"model.attention": "none", "model.name": "retinanet"})
    images = load_boxes(recipe.data.but(root=str(scenes)), train=False)
    torch.save(build_detector(recipe, images.spec).model.state_dict(), tmp_path / "plain.pt")
    model = ModelConfig(name="retinanet", attention="none")
    with pytest.raises(ConfigError, match="no channel gates to inspect; ecanet.attach adds them"):
        pages.run(tmp_path / "plain.pt", tmp_path / "page", model=model, data_name="scenes", data_dir=str(scenes))
