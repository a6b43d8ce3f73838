"""torchvision's detectors, by the same commands: weights, classes, frozen parts, proven gates, restored runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights

from ecanet import attached
from ecanet.data import DataSpec
from ecanet.data.scenes import SceneConfig
from ecanet.errors import CheckpointError, ConfigError
from ecanet.networks import detector_classes, find
from ecanet.recipes import find as find_recipe
from ecanet.recipes import with_settings
from ecanet.training import Detection, build_detector, restore
from ecanet.training.detectors import StoredBatchNorm2d, select_classes

slow = pytest.mark.slow
SMALLEST = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"


def make(name, classes=("cat", "dog", "kite"), size=64, **settings):
    spec = DataSpec(class_names=tuple(classes), channels=3, size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
    return build_detector(with_settings(find_recipe("scenes"), {"model.name": name, **settings}), spec)


def spread(model, seed=0):
    """Return the state of ``model`` with values that are all different; some variances are tiny, so eps counts."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
    for name, value in state.items():
        if name.endswith("running_var"):
            value[::3] = 1e-4
            state[name.replace("running_var", "weight")][::3] = 1e-2
    return state


def test_rows_of_known_classes_are_selected():
    """Two anchors, five labels: labels 0, 4 and 2 are wanted; boxes have four numbers for each label."""
    scores = torch.arange(10.0).reshape(10, 1)
    boxes = torch.arange(20.0).reshape(20, 1)
    state = {"x.cls_logits.weight": scores, "y.bbox_pred.weight": boxes, "z.weight": torch.ones(3)}
    own = {
        "x.cls_logits.weight": torch.zeros(6, 1),
        "y.bbox_pred.weight": torch.zeros(12, 1),
        "z.weight": torch.ones(3),
    }
    found = select_classes(state, own, [0, 4, 2], labels=5)
    assert found["x.cls_logits.weight"].flatten().tolist() == [0, 4, 2, 5, 9, 7]
    assert found["y.bbox_pred.weight"].flatten().tolist() == [0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11]
    assert found["z.weight"] is state["z.weight"]


def test_label_zero_is_left_out():
    """RetinaNet and FCOS of torchvision's have an output for it, which never learns anything but zero."""
    found = {"labels": torch.tensor([2, 0, 1]), "scores": torch.tensor([0.9, 0.8, 0.7])}
    task = SimpleNamespace(model=lambda images, targets: [found])
    (kept,) = Detection.forward(task, [torch.zeros(3, 8, 8)])
    assert kept["labels"].tolist() == [2, 1]
    assert kept["scores"].tolist() == pytest.approx([0.9, 0.7])


def test_stored_statistics_stay():
    norm = nn.Sequential(StoredBatchNorm2d(2)).train()
    x = torch.randn(4, 2, 3, 3) + 5
    torch.testing.assert_close(norm(x), x / (1 + 1e-5) ** 0.5)
    assert norm[0].running_mean.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("torchvision:resnet50", {}, "it is no detector; choose faster_rcnn"),
        ("timm:resnet18", {}, "it is no detector; choose faster_rcnn"),
        ("torchvision:keypointrcnn_resnet50_fpn", {}, "needs key points"),
        ("torchvision:fasterrcnn_resnet51_fpn", {}, "did you mean torchvision:fasterrcnn_resnet50_fpn"),
        ("mask_rcnn", {"model.where": "layer1"}, "has its gates built in"),
        (SMALLEST, {"model.attention": "none", "model.where": "*"}, "attention is 'none'"),
        (SMALLEST, {"detector.frozen_stages": 1}, "is no ResNet: set detector.frozen_stages=0"),
    ],
)
def test_what_does_not_fit_is_one_line(name, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (SMALLEST, "it is for detection; train it on images with boxes, coco:PATH or scenes"),
        (
            "torchvision:deeplabv3_resnet50",
            "it is for segmentation, and there are no data for that here; name a classifier",
        ),
        ("torchvision:r3d_18", "it is for video, and there are no data for that here; name a classifier"),
    ],
)
def test_no_classifier_of_photographs(ecanet, name, message):
    code, _, err = ecanet("train", "digits", "--model", name)
    assert (code, err) == (2, f"ecanet: {name} is no classifier: {message}\n")
    with torch.device("meta"):
        assert isinstance(find(name), nn.Module)


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        (SMALLEST, 15),
        pytest.param("torchvision:fasterrcnn_resnet50_fpn", 16, marks=slow),
        pytest.param("torchvision:maskrcnn_resnet50_fpn", 16, marks=slow),
        pytest.param("torchvision:retinanet_resnet50_fpn_v2", 16, marks=slow),
        pytest.param("torchvision:fcos_resnet50_fpn", 16, marks=slow),
        pytest.param("torchvision:ssd300_vgg16", 8, marks=slow),
        pytest.param("torchvision:ssdlite320_mobilenet_v3_large", 14, marks=slow),
    ],
)
def test_gates_are_attached_proven_and_trained(name, gates):
    built = make(name)
    sites = attached(built.model)
    assert [site.calls for site in sites] == [1] * gates
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([3])}
    target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    losses = built.model.train()(images, [target, target])
    torch.stack(list(losses.values())).sum().backward()
    # In a random network some late gate may have no gradient, behind a ReLU that is zero.
    moved = [p.grad.abs().sum() > 0 for site in sites for p in built.model.get_submodule(site.name).parameters()]
    assert sum(moved) > 0.8 * gates


@slow
def test_frozen_parts_and_their_gates():
    frozen = {"detector.frozen_stages": 2, "detector.norm": "eval", "detector.freeze_attention": True}
    model = make("torchvision:fcos_resnet50_fpn", **frozen).model
    body = model.backbone.body
    still = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "bn1", "layer1", "layer2"}
    assert not any(p.requires_grad for p in body.layer2.parameters())
    assert all(p.requires_grad for p in body.layer3.parameters())
    assert all(isinstance(m, StoredBatchNorm2d) for m in body.modules() if isinstance(m, nn.BatchNorm2d))
    frozen |= {"detector.freeze_attention": False, "detector.norm": "frozen"}
    body = make("torchvision:fcos_resnet50_fpn", **frozen).model.backbone.body
    assert body.layer1[0].eca.conv.weight.requires_grad
    assert not body.layer4[0].bn1.weight.requires_grad


@slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_default_weights_make_torchvisions_own_network(name, monkeypatch):
    state = spread(get_model(name, weights=None, weights_backbone=None))
    own = {key: value for key, value in state.items() if "v2" in name or "num_batches" not in key}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *_, **__: own)
    member = list(get_model_weights(name))[-1]
    reference = get_model(name, weights=member, min_size=64, max_size=107).eval()
    settings = {"model.weights": "default", "detector.norm": "eval", "detector.frozen_stages": 1}
    built = make(f"torchvision:{name}", detector_classes(f"torchvision:{name}"), **settings)
    assert not built.exchanged
    assert "attached 16 gates" in "\n".join(built.describe())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(built.model.eval().backbone(x).values(), reference.backbone(x).values(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    trained = {key for key, p in reference.named_parameters() if p.requires_grad}
    gates = {key for key, _ in built.model.named_parameters() if ".eca." in key}
    norms = {key for key, _ in built.model.named_parameters() if ".bn" in key or "downsample.1" in key}
    found = {key for key, p in built.model.named_parameters() if p.requires_grad}
    assert found - gates - norms == trained - norms
    few = make(f"torchvision:{name}", ("kite", "cat"), **settings)
    assert not few.exchanged  # COCO knows both


@slow
def test_weights_for_other_classes_exchange_the_head_alone(tmp_path):
    other = make(SMALLEST, ("a", "b", "c", "d"), **{"model.attention": "none"}).model
    torch.save(spread(other), tmp_path / "w.pth")
    built = make(SMALLEST, **{"model.weights": str(tmp_path / "w.pth")})
    assert {name.rpartition(".")[0] for name in built.exchanged} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    own = built.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in other.state_dict().items() if key not in built.exchanged)
    assert built.model.roi_heads.box_predictor.cls_score.weight.any()  # a head of zeros would not be torchvision's
    torch.save({"backbone.body.0.0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="tensors beside the head are missing"):
        make(SMALLEST, **{"model.weights": str(tmp_path / "part.pth")})


@slow
def test_the_commands(ecanet, monkeypatch, tmp_path):
    few = SceneConfig(train=8, held_out=4)
    monkeypatch.setattr("ecanet.data.boxes.SceneConfig", lambda **_: few)
    data = ["--data-dir", "scenes", "--set", "data.batch_size=4", "--set", "data.image_size=96"]
    code, out, err = ecanet("train", "scenes", "--model", SMALLEST, *data, "--epochs", 1, "--out", "run")
    assert (code, err) == (0, "")
    assert "attached 15 gates (eca), proven" in out
    assert len(json.loads((tmp_path / "run" / "network.json").read_text())["attached"]) == 15
    code, out, err = ecanet("eval", "run", "--json")
    assert (code, err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert json.loads(out)["AP"] == metrics["AP"]
    assert len(attached(restore("run").model)) == 15
    picture = next((tmp_path / "scenes").rglob("val2017/*.png"))
    code, out, err = ecanet("detect", "run", picture, "--threshold", 0)
    assert (code, err) == (0, "")
    code, _, err = ecanet("train", "--resume", "run", "--epochs", 2)
    assert (code, err) == (0, "")
    arms = ["--model", SMALLEST, "--variants", "eca-adaptive", "--seeds", 2, "--epochs", 1, "--out", "arms", *data]
    code, out, err = ecanet("ablate", "scenes", *arms)
    assert (code, err) == (0, "")
    assert out.count(": box AP ") == 4
    assert f"none (plain {SMALLEST})" in out
    state = find(SMALLEST).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *_, **__: state)
    code, out, err = ecanet("detect", "--model", SMALLEST, "--weights", "default", picture, "--threshold", 0, "--json")
    assert (code, err) == (0, "")
    assert {found["name"] for found in json.loads(out)[0]["objects"]} <= set(detector_classes(SMALLEST))
    code, _, err = ecanet(
        "eval", "--model", SMALLEST, "--weights", "default", "--data", "scenes", "--data-dir", "scenes"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "are for other classes than these 10" in err
