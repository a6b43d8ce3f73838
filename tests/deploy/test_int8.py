"""int8: close to float32 in the target's own runtime, gates with their whole range, and one line for mistakes."""

import json
import math
import re

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import ecanet
import tiny_runs
from ecanet import deploy
from ecanet.errors import EcanetError

CLASSES = ("dark", "grey", "light")


def make_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of three brightness levels, which a few linear steps tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randn(count, 3, 16, 16, generator=generator) + 2 * (labels[:, None, None, None] - 1), labels


@pytest.fixture(scope="module")
def model():
    """A small network that was trained for a moment, with gates that are not neutral."""
    torch.manual_seed(0)
    net = ecanet.create_model("resnet8", num_classes=3)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for step in range(15):
        images, labels = make_images(48, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval()


def quantize(model: nn.Module, path, target: str = "onnx", **options):
    calibration, _ = make_images(64, 100)
    return deploy.quantize(
        model, path, target=target, calibration=calibration, held_out=make_images(90, 101), **options
    )


TARGETS = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte"}


# The runtimes' packages warn about their own code.
DEPLOY = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("target", [name if name == "onnx" else pytest.param(name, marks=DEPLOY) for name in TARGETS])
def test_int8_is_close_to_float32(model, target, tmp_path, capsys):
    if target not in deploy.TARGETS:
        pytest.skip(f"{target} is not among the targets")
    for package in (*deploy.TARGETS[target].packages, *deploy.QUANTIZERS[target].packages):
        pytest.importorskip(package)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / f"net{TARGETS[target]}"
    report = quantize(model, path, target)
    assert capsys.readouterr().out == "", "a result as JSON must be alone there"
    assert report.before > 90
    assert abs(report.after - report.before) <= 2.5
    assert report.agreement >= 95
    assert (report.images, report.calibration) == (90, 64)
    assert 0 < max(report.layers.values()) < 0.25
    assert {"fc", "layer2.0.branch.0", "layer3.0.shortcut.0"} <= set(report.layers)
    assert list(report.layers.values()) == sorted(report.layers.values(), reverse=True)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_layers_have_their_names_and_int8_weights(model, tmp_path):
    report = quantize(model, tmp_path / "net.onnx", classes=CLASSES)
    assert {"fc", "layer2.0.branch.0"} <= set(report.layers)
    file = onnx.load(str(tmp_path / "net.onnx"))
    sizes = {one.name: onnx.numpy_helper.to_array(one) for one in file.graph.initializer}
    weights = [value for name, value in sizes.items() if "weight_quantized" in name]
    assert len(weights) >= 12
    assert {value.dtype.name for value in weights} == {"int8"}
    about = json.loads(next(one.value for one in file.metadata_props if one.key == "ecanet"))
    assert about["classes"] == list(CLASSES)
    assert "in float32" in str(report)


@pytest.mark.parametrize("lossless", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_gate_has_its_whole_range(lossless, tmp_path):
    """Calibrated on images that hardly open a gate, it still opens to sigmoid's 1 on others."""
    torch.manual_seed(0)
    net = ecanet.create_model("resnet8", num_classes=3).eval()
    if lossless:
        for module in net.modules():
            if isinstance(module, ecanet.ECA):
                module.neutralize()
    quantize(net, tmp_path / "net.onnx")
    graph = onnx.load(str(tmp_path / "net.onnx")).graph
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    outputs = {node.output[0] for node in graph.node if node.op_type == "Sigmoid"}
    readers = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in outputs]
    assert len(readers) == 3
    for node in readers:
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        assert (float(scale), int(zero)) == (1 / 256, 0)  # sigmoid(0) is 128 steps: exact


def test_large_sums_do_not_saturate(tmp_path, monkeypatch):
    """Pairs of the largest products exceed 16 bits, in which processors without VNNI add them."""
    net = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    nn.init.constant_(net[0].weight, 0.5)
    asked = []
    create = onnxruntime.InferenceSession

    def watch(path, options, **others):
        asked.append(options)
        return create(path, options, **others)

    images = torch.rand(32, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:2] = 1
    deploy.quantize(
        net, tmp_path / "net.onnx", target="onnx", calibration=images, held_out=(images, torch.zeros(32).long())
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    found = deploy.QUANTIZERS["onnx"].open(tmp_path / "net.onnx")(images)
    assert (found - net(images)).abs().max() < 0.05  # the largest output is 4
    assert asked[0].get_session_config_entry("session.x64quantprecision") == "1"


class Broken(nn.Module):
    def forward(self, x):
        return x.sum((2, 3)) if x.sum() > 0 else x.mean((2, 3))


class Around(nn.Module):
    """A classifier whose scores are those of ``change``."""

    def __init__(self, change):
        super().__init__()
        self.conv, self.change = nn.Conv2d(3, 3, 1), change

    def forward(self, x):
        return self.change(self.conv(x).mean((2, 3)))


def spoil(images, number):
    """Return ``images`` with one pixel of this ``number``."""
    images[0, 0, 0, 0] = number
    return images


IMAGES, LABELS = make_images(8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "torchscript", "path": "net.pt"}, "there is no int8 for torchscript; choose onnx"),
        ({"target": "nowhere"}, "there is no int8 for nowhere; choose onnx, openvino, executorch"),
        ({"target": "onnxruntime"}, "there is no int8 for onnxruntime; choose onnx, openvino, executorch"),
        ({"path": "net.bin"}, "must end in .onnx"),
        ({"calibration": torch.zeros(4, 3, 8, 8)}, "must be images of one size"),
        ({"calibration": torch.randn(1, 3, 16, 16)}, "calibration needs at least two images"),
        ({"calibration": torch.zeros(8, 3, 16, 16)}, "calibration needs at least two images that are not empty"),
        ({"calibration": spoil(make_images(8, 0)[0], math.nan)}, "calibration has numbers that are NaN or infinite"),
        ({"calibration": torch.zeros(8, 3, 16, 16, device="meta")}, "calibration must be a tensor with values"),
        ({"held_out": (spoil(make_images(8, 0)[0], math.inf), LABELS)}, "held_out has numbers that are NaN or"),
        ({"held_out": (IMAGES, LABELS + 1)}, "ResNet has classes 0 to 2, and the labels are 1 to 3"),
        ({"held_out": (IMAGES, LABELS - 1)}, "ResNet has classes 0 to 2, and the labels are -1 to 1"),
        ({"held_out": (IMAGES, LABELS.float())}, "labels of held_out must be integers, the numbers of the classes"),
        ({"held_out": IMAGES}, "held_out must be a pair of images and labels"),
        ({"held_out": (IMAGES, LABELS, LABELS)}, "held_out must be a pair of images and labels"),
        ({"model": "resnet8"}, "quantize takes a network (a torch.nn.Module), got 'resnet8'"),
        ({"model": Around(lambda y: y[..., None])}, "it needs the scores (N, K) of two classes or more"),
        ({"model": Around(lambda y: y[:, :1])}, "it needs the scores (N, K) of two classes or more"),
        ({"model": Around(lambda y: y > 0)}, "it needs the scores (N, K) of two classes or more"),
        ({"model": Around(lambda y: y + torch.rand(3))}, "Around returns other numbers when it runs on the same"),
        ({"model": Around(lambda y: y / 0 * 0)}, "Around returns scores that are NaN or infinite"),
        ({"model": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}, "no convolution or linear layer"),
        ({"calibration": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)}, "calibration must be images (N, C, H, W) in"),
        ({"held_out": (torch.zeros(4, 3, 16, 16), torch.zeros(3).long())}, "have one label each"),
        ({"model": Broken()}, "the forward of Broken reads values of the images"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(model, options, message, tmp_path):
    settings = {"model": model, "target": "onnx", "path": "net.onnx", **options}
    path = tmp_path / settings.pop("path")
    settings = {"calibration": make_images(8, 0)[0], "held_out": make_images(8, 1), **settings}
    with pytest.raises(EcanetError, match=re.escape(message)) as caught:
        deploy.quantize(settings.pop("model"), path, **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_quantizes_a_run(tmp_path, ecanet, monkeypatch):
    tiny_runs.add_tiny(monkeypatch)
    tiny_runs.run(tiny_runs.TINY.but(epochs=1), tmp_path / "run")
    code, out, err = ecanet("export", tmp_path / "run", "--int8", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["calibration"], report["images"]) == (48, 20)
    assert report["path"] == str(tmp_path / "run" / "model-int8.onnx")
    for options, message in [
        (["--images", "digits"], "--images is for --int8"),
        (["--int8", "--no-check"], "which takes no --batch-size, --image-size or --no-check"),
        (["--int8", "--images", "digits"], "has 10 classes and the network 3"),
    ]:
        code, _, err = ecanet("export", tmp_path / "run", *options)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["attached", "built in"])
def test_quantization_aware_training_in_eager_mode(kind):
    """`prepare_qat` finds the layers of a network with gates; a step trains both, and no gate is lost or doubled."""
    import torchvision

    net = torchvision.models.quantization.mobilenet_v2(num_classes=3) if kind == "attached" else None
    if net is None:
        net = ecanet.create_model("resnet8", num_classes=3)
    else:
        ecanet.attach(net)
    gates = sum(isinstance(m, ecanet.ECA) for m in net.modules())
    net.train()
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.prepare_qat(net, inplace=True)
    assert sum(isinstance(m, ecanet.ECA) for m in net.modules()) == gates > 0
    assert sum(hasattr(m, "weight_fake_quant") for m in net.modules()) > 5
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".eca." in name} <= changed
    assert any("conv" in name and ".eca." not in name for name in changed)
