"""The inference copy says what the network says: exactly in float64, within its own rounding in float32."""

import pytest
import timm
import torch
import torchvision
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.attention import AugmentedConv2d, find_attention
from ecanet.errors import ConfigError
from ecanet.inference.blocks import InferenceBlock
from ecanet.models.detection import create_detector
from ecanet.models.execution import predict_means
from ecanet.models.resnet import BOTTLENECK, ResNet
from ecanet.models.slots import Slot
from ecanet.ops import reference
from later_attentions import mark_slow
from lively import images, lively

LAST_NORMS = {"BasicBlock": "bn2", "Bottleneck": "bn3"}


def bottlenecks(attention):
    """A small network of two bottlenecks a stage."""
    return ResNet(BOTTLENECK, (2, 2, 2), Slot(kind=find_attention(attention)), num_classes=10, in_channels=3)


def options_for(attention):
    return {"reduction": 8} if attention == "gc" else {}  # 16 channels are too few for its 16


def of_timm(attention, layers=(1, 1, 1, 1), block="Bottleneck", **options):
    return timm_resnet.ResNet(getattr(timm_resnet, block), layers, block_args={"attn_layer": attention}, **options)


def of_torchvision(block, **options):
    """Return a network of one block a stage, which is what more of them are, too."""
    resnet = torchvision.models.resnet
    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=10, **options)


def attached(model, attention="eca", **options):
    return ecanet.attach(model, attention, preserve=False, example=torch.zeros(1, 3, 32, 32), **options)


def in_place_of_timms(model):
    with pytest.warns(UserWarning, match="outputs change"):
        return attached(model, replace="se")


SLOW = {param.values[0] for param in mark_slow(ecanet.list_attentions()) if param.marks}
SLOW |= {"resnet34", "resnet50", "resnet56", "resnet101", "resnet152", "torchvision mobilenet_v2"}
WHOLE = {f"{name} in mobilenet_v2" for name in ("se", "cbam", "gc")}  # their gates are in smaller networks, too
# by default, each attention is in one kind of block: every second one in bottlenecks, and eca in both
WHOLE |= {f"{a} in {('bottlenecks', 'basic blocks')[at % 2]}" for at, a in enumerate(ecanet.list_attentions()) if at}

NETWORKS = {
    **{f"{a} in basic blocks": lambda a=a: ecanet.create_model("resnet14", attention=a, **options_for(a))
       for a in ecanet.list_attentions()},
    **{f"{a} in bottlenecks": lambda a=a: bottlenecks(a) for a in ecanet.list_attentions()},
    **{name: lambda name=name: ecanet.create_model(name) for name in ecanet.list_models()},
    **{f"{a} in mobilenet_v2": lambda a=a: ecanet.create_model("mobilenet_v2", attention=a, **options_for(a))
       for a in ("none", "se", "cbam", "gc")},
    "torchvision basic blocks": lambda: of_torchvision("BasicBlock"),
    "torchvision bottlenecks": lambda: of_torchvision("Bottleneck"),
    "torchvision mobilenet_v2": torchvision.models.mobilenet_v2,
    "attached to basic blocks": lambda: attached(of_torchvision("BasicBlock")),
    "attached to bottlenecks": lambda: attached(timm_resnet.ResNet(timm_resnet.Bottleneck, (1, 1, 1, 1))),
    "attached to mobilenet_v2": lambda: attached(torchvision.models.mobilenet_v2()),
    "cbam attached": lambda: attached(of_torchvision("BasicBlock"), "cbam"),
    "lossless and trained": lambda: ecanet.attach(of_torchvision("BasicBlock"), example=torch.zeros(1, 3, 32, 32)),
    "attached and folded": lambda: ecanet.fold(
        ecanet.attach(of_torchvision("BasicBlock"), example=torch.zeros(1, 3, 32, 32))
    ),
    "attached in place of timm's": lambda: in_place_of_timms(of_timm("se")),
    "timm plain": lambda: of_timm(None, block="BasicBlock", drop_path_rate=0.1),
    "timm eca": lambda: of_timm("eca"),
    "timm se": lambda: of_timm("se"),
    "timm cbam": lambda: of_timm("cbam"),
    "timm anti-aliased": lambda: of_timm("eca", aa_layer=timm.layers.BlurPool2d),
    "timm d": lambda: timm.create_model("ecaresnet26t"),
    "timm group norm": lambda: of_timm("eca", norm_layer=timm.layers.GroupNorm),
    "frozen norms": lambda: of_torchvision("BasicBlock", norm_layer=FrozenBatchNorm2d),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in WHOLE or n.split(" in ")[0] in SLOW else n for n in NETWORKS],
)
def test_the_copy_is_the_network_in_float64(name):
    torch.manual_seed(0)
    model = lively(NETWORKS[name]()).double()
    before = {key: value.sum() for key, value in model.state_dict().items()}
    # large networks see few pixels
    x = images(2, 32 if sum(p.numel() for p in model.parameters()) > 5e6 else 24).double()
    optimized = ecanet.optimize(model, example=x)
    with torch.no_grad():
        expected, actual = model(x), optimized(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert all(value.sum() == before[key] for key, value in model.state_dict().items())
    assert not any(m.training for m in optimized.modules())
    left = sum(type(m) is nn.BatchNorm2d or isinstance(m, FrozenBatchNorm2d) for m in optimized.modules())
    beyond = sum(isinstance(m, AugmentedConv2d) for m in model.modules())  # no convolution to fold into
    assert left == beyond


@pytest.mark.parametrize("backbone", ["resnet8", "mobilenet_v2"])
def test_detectors_too(backbone):
    model = lively(create_detector("faster_rcnn", backbone, small=True)).double()
    optimized = ecanet.optimize(model)
    x = images(1, 64).double()
    with torch.no_grad():
        expected, actual = model.backbone(x), optimized.backbone(x)
    assert list(actual) == list(expected)
    for level in expected:
        torch.testing.assert_close(actual[level], expected[level], rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())


# float32

LARGE = {
    "resnet18": lambda: ecanet.create_model("resnet18"),
    "resnet50": lambda: ecanet.create_model("resnet50"),
    "mobilenet_v2": lambda: ecanet.create_model("mobilenet_v2"),
    "torchvision resnet50": torchvision.models.resnet50,
    "timm resnet50, eca": lambda: of_timm("eca", (3, 4, 6, 3), zero_init_last=False),
}


def calibrated(model):
    """``model`` with running statistics of what flows through it, and the last norm of a branch at a quarter.

    With that norm at 1, as a random network has it, ResNet-50 makes any change of its input 21 times as large, and
    torchvision's without gates 89 times: such a network is itself 1e-5 and 4e-5 away from float64.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        if type(module).__name__ in LAST_NORMS:
            nn.init.constant_(module.get_submodule(LAST_NORMS[type(module).__name__]).weight, 0.25)
    model.train()
    with torch.no_grad():
        for seed in range(2):
            model(images(8, 64, seed))
    return model.eval()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "resnet18")) for n in LARGE])
def test_rounding_and_top_1(name):
    torch.manual_seed(0)
    model = calibrated(LARGE[name]())
    optimized = ecanet.optimize(model)
    x = images(256, 32, seed=10)
    with torch.inference_mode():
        expected = torch.cat([model(part) for part in x.split(32)])
        actual = torch.cat([optimized(part) for part in x.split(32)])
        exact = model.double()(x[:8].double())
    assert (actual - expected).norm() / expected.norm() < 1e-5
    # no further from float64 than the network itself, but for chance
    assert (actual[:8] - exact).norm() < 1.5 * (expected[:8] - exact).norm()
    first, second = expected.topk(2).values.unbind(1)
    clear = first - second > 1e-5 * expected.norm(dim=1)  # by more than rounding may move
    assert clear.sum() >= 250
    assert torch.equal(actual.argmax(1)[clear], expected.argmax(1)[clear])


def test_autocast_leaves_the_gate_in_float32():
    """Means and gates have more digits than bfloat16; what is left between the two is the rounding of activations."""
    torch.manual_seed(0)
    model = lively(bottlenecks("eca"))
    optimized = ecanet.optimize(model)
    seen = []
    for module in optimized.modules():
        if isinstance(module, ecanet.ECA):
            gate = module.gate
            module.gate = lambda p, gate=gate: seen.append((p, gate(p), gate)) or seen[-1][1]
    x = images(4, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = optimized(x)
    assert len(seen) == 6
    with torch.no_grad():
        for p, g, gate in seen:
            assert p.dtype == g.dtype == torch.float32
            assert not torch.equal(p, p.bfloat16().float())
            torch.testing.assert_close(g, gate(p), rtol=0, atol=1e-6)  # outside of autocast
        expected = model(x)
    assert actual.dtype == torch.bfloat16
    # 6 blocks of 3 convolutions, a shortcut and a sum, stem and head: as many independent roundings
    assert (actual - expected).norm() < (6 * 5 + 2) ** 0.5 * torch.finfo(torch.bfloat16).eps / 2 * expected.norm()


def test_gradients_reach_the_input():
    for name in ("resnet14", "mobilenet_v2"):
        model = lively(ecanet.create_model(name)).double()
        x = images(2, 24).double().requires_grad_()
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        (actual,) = torch.autograd.grad(ecanet.optimize(model)(x).square().sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


# what is done where


def test_the_gate_reads_the_narrower_tensor(monkeypatch):
    """Before the expansion of a bottleneck, after the projection of an inverted one and after a 3x3 convolution."""
    read = []
    squeeze = reference.squeeze
    monkeypatch.setattr(reference, "squeeze", lambda x, *rest: (read.append(x.shape[1]), squeeze(x, *rest))[1])
    copies = [ecanet.optimize(m) for m in (bottlenecks("eca"), *map(ecanet.create_model, ("resnet8", "mobilenet_v2")))]
    read.clear()
    with torch.no_grad():
        copies[0](images(1, 16))
        assert read == [16, 16, 32, 32, 64, 64]  # of 64 to 256
        read.clear()
        copies[1](images(1, 16))
        assert read == [16, 32, 64]
        read.clear()
        copies[2](images(1, 32))
        assert read[:4] == [16, 24, 24, 32]  # of 32 to 192


def test_means_through_a_convolution():
    convolution = nn.Conv2d(8, 32, 1).double()
    h = torch.randn(3, 8, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(predict_means(convolution, h), convolution(h).mean((2, 3)), rtol=1e-13, atol=1e-14)


def test_what_is_listened_to_is_still_called():
    model = attached(lively(torchvision.models.resnet18()), where="layer4.*.bn1")  # between the convolutions
    model = model.double()
    seen = []
    for name in ("conv1", "layer1.0", "layer2.0.bn1", "layer3.0.downsample.0"):
        model.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: seen.append((name, y)))
    optimized = ecanet.optimize(model)
    x = images(1, 32).double()
    with torch.no_grad():
        expected = model(x)
        theirs = dict(seen)
        seen.clear()
        torch.testing.assert_close(optimized(x), expected, rtol=1e-9, atol=1e-9)
    assert dict(seen).keys() == theirs.keys()
    for name, y in seen:
        torch.testing.assert_close(y, theirs[name], rtol=1e-9, atol=1e-9)
    assert sum(isinstance(m, InferenceBlock) for m in optimized.modules()) == 8 - 5
    assert len(ecanet.attached(model)) == len(ecanet.attached(optimized)) == 2


def test_blocks_that_were_changed_keep_their_forward():
    model = lively(torchvision.models.resnet18()).double()
    model.layer1[0].relu = nn.GELU()
    whole = model.layer2[1].forward
    model.layer2[1].forward = lambda x: 2 * whole(x)
    optimized = ecanet.optimize(model)
    assert not isinstance(optimized.layer1[0], InferenceBlock)
    with torch.no_grad():
        torch.testing.assert_close(optimized(images(1, 32).double()), model(images(1, 32).double()))


def test_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="Sequential has nothing to optimize: no convolution is followed by"):
        ecanet.optimize(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ConfigError, match="optimize takes a network"):
        ecanet.optimize("resnet50")  # type: ignore[arg-type]
