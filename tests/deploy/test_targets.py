"""Every target in its own runtime: `make test-deploy`, which installs the runtimes.

One row is a network with one attention in one target. Images are small: what is compared does not depend on it.
"""

import json
from collections import Counter

import pytest
import torch

import ecanet
from ecanet import networks
from ecanet.attention import CBAM, Attention
from ecanet.deploy import FORMS, TARGETS, checking, preparation, programs, targets
from ecanet.errors import ExportError
from ecanet.models import small_example
from ecanet.testing import measure_relative_error
from lively import images, lively

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.filterwarnings("ignore"),  # the runtimes' packages warn about their own code
]
SIDE = 64
CLASSES = tuple("abcdefghij")
NAMES = ("resnet50", "mobilenet_v2", "timm:regnetx_002", "timm:efficientnet_b0")
ATTENTIONS = ("eca", "se", "cbam")
SIZES = {"executorch": 1, "onnxruntime": 2}
"""Shapes at which a file is compared, where they are fewer than two batch sizes of two image sizes."""
BANNED = {"Shape", "Gather", "Expand"}
NODES = {"eca": 7, "se": 7, "cbam": 14}
"""The most operations of a module. CBAM is two gates, with a mean and a maximum each: 8 and 6, so 7 a gate."""


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0)


@pytest.fixture
def no_plain(monkeypatch):
    """The rows of the table need no plain network beside them, which is as long again."""
    monkeypatch.setattr(checking, "count_attention", lambda model: 0)


def require(target):
    for package in TARGETS[target].packages:
        pytest.importorskip(package)


def enliven(model):
    """Let every layer do something (timm's residual branches begin at zero), with gates that differ from each other."""
    lively(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters() if isinstance(module, Attention) else ():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model.eval()


def build(name, attention):
    torch.manual_seed(0)
    if networks.is_ours(name):
        return enliven(networks.find(name, attention=attention, num_classes=10))
    timm = pytest.importorskip("timm")
    model = timm.create_model(name.partition(":")[2], num_classes=10).eval()
    return enliven(ecanet.attach(model, attention))


def export(model, folder, target, **options):
    suffix = TARGETS[target].suffix
    example = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return ecanet.export(model, folder / f"model{suffix}", target=target, example=example, **options)


def check_nodes(report, plain, gates, attention):
    """Check what attention modules add to an ONNX file, and return the nodes of one; CBAM's are two gates."""
    more = Counter(report) - Counter(plain)
    assert not BANNED & set(more)
    added = (sum(report.values()) - sum(plain.values())) / gates
    assert 0 < added <= NODES[attention]
    return added


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_in_the_targets_own_runtime(tmp_path, request, name, attention, target):
    require(target)
    if target != "onnx":
        request.getfixturevalue("no_plain")
    model = build(name, attention)
    report = export(model, tmp_path, target)
    assert len(report.comparisons) == SIZES.get(target, 4)
    assert all(c.passed and c.allowed < 1e-4 for c in report.comparisons)
    assert measure_influence(model) > 100 * max(c.allowed for c in report.comparisons), "without gates it would pass"
    assert set(report.gates) == {TARGETS[target].form}
    if target in ("onnx", "onnxruntime"):
        assert not BANNED & set(report.operations)
    if target == "onnx":
        assert 0 < report.added <= NODES[attention]


@torch.no_grad()
def measure_influence(model):
    """Return the relative difference between the outputs of the network and of the plain one."""
    x = images(2, SIDE)
    return measure_relative_error([preparation.remove_attention(model)(x)], [model(x)])


def build_detector(attention):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    with small_example(detector) as example:
        ecanet.attach(detector, attention, example=example)
    enliven(detector)
    for module in detector.modules():
        if isinstance(module, CBAM):
            # With twice these weights the scores are 1 - 1e-7, and the last bit decides which boxes are kept.
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(0.5)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one batch, without which nothing reaches the last layers
    with torch.no_grad():
        detector.backbone.train()(torch.randn(4, 3, 96, 128, generator=torch.Generator().manual_seed(2)))
    return detector.eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_detector_is_equal_in_onnx_runtime(tmp_path, attention):
    detector = build_detector(attention)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))
    report = ecanet.export(detector, tmp_path / "m.onnx", target="onnx", example=[image])
    (found,) = report.comparisons
    exact = programs.run_network(programs.widen(detector), [image.double()])
    plain = preparation.remove_attention(detector)
    missing = checking.count_missing(exact, programs.run_network(plain, [image]))
    ecanet.export(plain, tmp_path / "plain.onnx", target="onnx", example=[image], check=False)
    operations = targets.TARGETS["onnx"].open(tmp_path / "plain.onnx").operations
    assert found.error <= found.allowed < 0.1
    assert missing > 0.5, "without its gates it would not pass"
    check_nodes(report.operations, operations, len(ecanet.attached(detector)), attention)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "onnx"])
def test_other_targets_say_why_they_take_no_detector(tmp_path, target):
    require(target)
    detector, image = build_detector("eca"), torch.rand(3, 96, 128)
    with pytest.raises(ExportError, match=f"{target} takes no detector, whose loops .* export it to onnx"):
        ecanet.export(detector, tmp_path / f"m{TARGETS[target].suffix}", target=target, example=[image])


def count(folder, target, form, monkeypatch):
    """Return partitions and operations of a small network whose gates have ``form``."""
    import dataclasses

    monkeypatch.setitem(targets.TARGETS, target, dataclasses.replace(TARGETS[target], form=form))
    report = export(build("resnet8", "eca"), folder, target)
    monkeypatch.undo()
    return report.partitions, sum(report.operations.values())


@pytest.mark.parametrize("target", ["onnx", "openvino", "executorch"])
def test_a_targets_form_has_the_fewest_partitions_and_operations(tmp_path, monkeypatch, no_plain, target):
    require(target)
    # The others have C x C weights, and so are no choice for wide networks; OpenVINO alone is faster with some of them.
    forms = ("conv1d", "conv2d", *(["mixed"] if target == "openvino" else []))
    counts = {form: count(tmp_path, target, form, monkeypatch) for form in forms}
    assert counts[TARGETS[target].form] == min(counts.values())
    assert set(counts) < set(FORMS)


@pytest.mark.parametrize("target", ["onnx", "openvino", "executorch"])
def test_cbams_form_has_fewer_operations_than_its_own_forward(tmp_path, monkeypatch, no_plain, target):
    require(target)
    model, counts = build("resnet8", "cbam"), {}
    for gates in (TARGETS[target].form, "as it is"):
        report = export(model, tmp_path, target)
        assert report.gates == {gates: 3}
        counts[gates] = report.partitions, sum(report.operations.values())
        monkeypatch.setattr(preparation, "build_gate", lambda attention, form: None)
    assert counts[TARGETS[target].form] < counts["as it is"]


def test_executorch_runs_mobilenet_as_one_delegate(tmp_path):
    require("executorch")
    report = export(build("mobilenet_v2", "eca"), tmp_path, "executorch", classes=CLASSES)
    assert (report.partitions, report.stray, report.added) == (1, 0, 0)
    assert json.loads((tmp_path / "model.json").read_text())["classes"] == list(CLASSES)
    assert any("takes batches of 1 alone" in note for note in report.notes)


def test_openvino_is_held_to_float32_and_its_default_is_reported(tmp_path, no_plain):
    require("openvino")
    import openvino

    report = export(build("resnet8", "eca"), tmp_path, "openvino", classes=CLASSES)
    (note,) = [note for note in report.notes if "default" in note]
    assert "its default on this processor is" in note
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    about = openvino.Core().read_model(tmp_path / "model.xml").get_rt_info(["ecanet"]).value
    assert json.loads(about)["classes"] == list(CLASSES)


@pytest.mark.parametrize("attention", ["gc", "gsop", "a2", "aa", "non-local"])
def test_openvino_converts_every_attention_with_a_transposition(tmp_path, no_plain, attention):
    require("openvino")
    # ResNet-18 with AA does not pass in OpenVINO at another size than the example's, which the check says.
    report = export(build("resnet8" if attention == "aa" else "resnet18", attention), tmp_path, "openvino")
    # The attention-augmented convolution pools large maps and no small ones, so its file takes one size.
    assert report.facts["size varies"] == (attention != "aa")
    assert len(report.comparisons) == (2 if attention == "aa" else 4)
