"""optimize() on networks that it has never heard of: what it folds, moves and leaves, and that it proves it."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import ecanet
from ecanet.errors import AttachError, ConfigError
from ecanet.inference import comparison
from ecanet.inference.blocks import InferenceBlock
from lively import images, lively

slow = pytest.mark.slow

FAMILIES = {
    "timm:test_efficientnet": (0, "so its output is less to read"),
    "timm:test_byobnet": (2, "does not follow a convolution"),
    "timm:test_resnet": (1, "not a dense 1x1"),
    "torchvision:mobilenet_v3_small": (1, "so its output is less to read"),
    "timm:mobilenetv3_small_050": (0, "so its output is less to read"),
    "timm:tf_efficientnetv2_b0": (0, "so its output is less to read"),
    "timm:regnetx_002": (13, None),
    "timm:resnext26ts": (8, None),
    "timm:hrnet_w18_small": (5, "not a dense 1x1"),
    "timm:ghostnet_050": (0, None),
    "torchvision:regnet_y_400mf": (16, None),
    "torchvision:resnext50_32x4d": (16, None),
    "torchvision:mnasnet0_5": (0, "so its output is less to read"),
    "torchvision:shufflenet_v2_x0_5": (0, None),
    "torchvision:efficientnet_b0": (0, "so its output is less to read"),
}
"""How many attached gates are moved, and a reason why others are not, by the network's name."""


def build(name):
    library, _, name = name.partition(":")
    return timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)


def check(model, *, example=None, size=64):
    """Optimize ``model`` in float64 and compare the outputs; return the copy."""
    model = model.double()
    x = images(2, size).double() if example is None else example
    fast = ecanet.optimize(model, example=x)
    with torch.no_grad():
        expected, actual = model(x), fast(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    return fast


def count_norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) if i > 3 else n for i, n in enumerate(FAMILIES)])
def test_families_with_attached_gates(name):
    moved, reason = FAMILIES[name]
    torch.manual_seed(0)
    model = lively(ecanet.attach(build(name), preserve=False))
    sites = len(ecanet.attached(model))
    fast = check(model)
    report = fast.optimization
    assert len(report.moved) == moved
    assert len(report.moved) + len(report.kept) >= sites  # timm's networks may have gates of their own
    assert (reason is None) or any(reason in text for text in report.kept.values())
    assert not count_norms(fast)
    blocks = [m for m in fast.modules() if isinstance(m, InferenceBlock) and isinstance(m.attention, ecanet.ECA)]
    assert len(blocks) >= moved


def test_a_family_without_anything_to_do():
    """ConvNeXt's layer norms depend on the image, and its gates stay."""
    model = lively(ecanet.attach(build("timm:test_convnext"), preserve=False))
    with pytest.raises(ConfigError, match=r"has nothing to optimize: .*; the gate '.*' stays: ") as raised:
        ecanet.optimize(model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
@slow
def test_torchvisions_detectors(name):
    model = lively(torchvision.models.get_model(name, weights=None, weights_backbone=None)).double()
    fast = ecanet.optimize(model)
    assert not count_norms(fast)
    x = images(1, 64).double()
    with torch.no_grad():
        for a, b in zip(fast.backbone(x).values(), model.backbone(x).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# small networks: which norms are folded


class Scale(nn.Module):
    """A norm of nobody's class: frozen, in plain arithmetic."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("slope", torch.rand(channels) + 0.5)
        self.register_buffer("offset", torch.randn(channels))

    def forward(self, x):
        return x * self.slope[:, None, None] + self.offset[:, None, None]


class Softened(Scale):
    """No norm: it bends."""

    def forward(self, x):
        return super().forward(x).tanh()


class Row(nn.Module):
    """Convolution, norm and more, run by a forward of the test."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.run(self, x)


def convolve(*, width=6, **options):
    return nn.Conv2d(3, width, 3, padding=1, **options)


def observe(module):
    module.register_forward_hook(lambda *_: None)
    return module


FOLDED = {
    "a norm of its own class": lambda: nn.Sequential(convolve(), Scale(6)),
    "frozen": lambda: nn.Sequential(convolve(bias=False), torchvision.ops.FrozenBatchNorm2d(6)),
    "timm's norm with activation": lambda: nn.Sequential(convolve(), timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)),
    "timm's norm and layer": lambda: timm.layers.ConvNormAct(3, 6, 3, act_layer="hard_swish"),
    "same padding": lambda: nn.Sequential(timm.layers.Conv2dSame(3, 6, 3, stride=2), nn.BatchNorm2d(6)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)),
    "reflected": lambda: nn.Sequential(convolve(padding_mode="reflect"), nn.BatchNorm2d(6)),
    "no affine": lambda: nn.Sequential(convolve(), nn.BatchNorm2d(6, affine=False)),
    "run twice": lambda: Row(lambda m, x: m.n(m.c(x)) + m.n(m.c(-x)), c=convolve(), n=nn.BatchNorm2d(6)),
    "behind an identity": lambda: nn.Sequential(convolve(), nn.Dropout(), nn.BatchNorm2d(6)),
    "traced by fx": lambda: torch.fx.symbolic_trace(nn.Sequential(convolve(), nn.BatchNorm2d(6))),
}  # fmt: skip

UNTOUCHED = {
    "output is read twice": lambda: Row(lambda m, x: m.n(y := m.c(x)) + y, c=convolve(), n=nn.BatchNorm2d(6)),
    "convolution has two norms": lambda: Row(
        lambda m, x: m.first(m.conv(x)) + m.second(m.conv(-x)),
        conv=convolve(), first=nn.BatchNorm2d(6), second=nn.BatchNorm2d(6),
    ),
    "norm has two convolutions": lambda: Row(
        lambda m, x: m.norm(m.first(x)) + m.norm(m.second(x)),
        first=convolve(), second=convolve(), norm=nn.BatchNorm2d(6),
    ),
    "something in between": lambda: Row(lambda m, x: m.norm(m.conv(x) + 1), conv=convolve(), norm=nn.BatchNorm2d(6)),
    "observed norm": lambda: nn.Sequential(convolve(), observe(nn.BatchNorm2d(6))),
    "observed convolution": lambda: nn.Sequential(observe(convolve()), nn.BatchNorm2d(6)),
    "observed container": lambda: nn.Sequential(observe(nn.Sequential(convolve())), nn.BatchNorm2d(6)),
    "parametrization": lambda: nn.Sequential(parametrizations.weight_norm(convolve()), nn.BatchNorm2d(6)),
    "weight norm": lambda: nn.Sequential(weight_norm(convolve()), nn.BatchNorm2d(6)),
    "standardised": lambda: nn.Sequential(timm.layers.StdConv2d(3, 6, 3), nn.BatchNorm2d(6)),
    "bent": lambda: nn.Sequential(convolve(), Softened(6)),
    "group norm": lambda: nn.Sequential(convolve(), nn.GroupNorm(2, 6)),
    "batch statistics": lambda: nn.Sequential(convolve(), nn.BatchNorm2d(6, track_running_stats=False)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", [*FOLDED, *UNTOUCHED])
def test_which_norms_are_folded(name):
    """Each network also has a pair that is folded, so that something can be done."""
    torch.manual_seed(0)
    model = lively(nn.Sequential((FOLDED | UNTOUCHED)[name](), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)))
    before = copy.deepcopy(model.state_dict())
    fast = check(model, size=9)
    assert len(fast.optimization.folded) == 1 + (name in FOLDED)
    assert fast.optimization.folded[-1] == "2"
    assert all(torch.equal(value.double(), before[key].double()) for key, value in model.state_dict().items())


def test_three_axes():
    model = lively(nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU())).double()
    fast = check(model, example=torch.randn(2, 2, 5, 6, 7, dtype=torch.float64))
    assert not count_norms(fast)
    assert next(fast.parameters()).is_contiguous(memory_format=torch.channels_last_3d)


# activations and gates


def test_activations_work_in_place_where_nobody_else_reads():
    model = Row(
        lambda m, x: m.second(m.first(m.conv(x))) + m.third(y := m.conv2(x)) + m.fifth(y[:, :1]) + y + m.fourth(x),
        conv=convolve(), conv2=convolve(), first=nn.SiLU(), second=nn.Hardswish(), third=nn.SiLU(),
        fourth=nn.Mish(), fifth=nn.SiLU(),
    )  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model)
    model[2].conv, model[2].conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    fast = check(lively(model), size=9)
    assert [getattr(fast[2], name).inplace for name in ("first", "second", "third", "fourth", "fifth")] == [
        True,
        *[False] * 4,
    ]


def gated(convolution, *rest):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), convolution, nn.BatchNorm2d(16), *rest)


GATED = {
    "moved": (lambda: gated(nn.Conv2d(8, 16, 1), ecanet.ECA(16), nn.ReLU()), True),
    "moved, one width": (lambda: gated(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1), ecanet.SE(16)), True),
    "grouped": (lambda: gated(nn.Conv2d(8, 16, 1, groups=2), ecanet.ECA(16)), False),
    "strided": (lambda: gated(nn.Conv2d(8, 16, 1, stride=2), ecanet.ECA(16)), False),
    "activation before": (lambda: gated(nn.Conv2d(8, 16, 1), nn.ReLU(), ecanet.ECA(16)), False),
    "narrowing": (lambda: gated(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1), ecanet.ECA(4)), False),
    "other form": (lambda: gated(nn.Conv2d(8, 16, 1), ecanet.make_attention("cbam", 16)), False),
    "observed": (lambda: gated(nn.Conv2d(8, 16, 1), observe(ecanet.ECA(16))), False),
}


@pytest.mark.parametrize("name", GATED)
def test_which_gates_are_moved(name):
    make, moves = GATED[name]
    torch.manual_seed(0)
    report = check(lively(make()), size=9).optimization
    assert (len(report.moved), len(report.kept)) == (int(moves), int(not moves))
    assert all(report.kept.values())


def test_two_attached_gates_behind_one_convolution_both_act():
    torch.manual_seed(0)
    model = nn.Sequential(build("timm:test_resnet"))
    for attention in ("eca", "se"):
        ecanet.attach(model, attention, preserve=False)
    check(lively(model))


# the proof


def test_a_wrong_copy_is_refused_in_one_line(monkeypatch):
    class Wrong(comparison.Editor):
        def apply(self, plan):
            super().apply(plan)
            next(iter(self.modules.values()))[0].weight.data *= 1 + 1e-6

    model = lively(nn.Sequential(convolve(), nn.BatchNorm2d(6)))
    monkeypatch.setattr(comparison, "Editor", Wrong)
    with pytest.raises(ConfigError, match=r"Sequential cannot be optimized: a result of its copy, .* is off by .*e-07"):
        ecanet.optimize(model, example=images(1, 9))


def test_a_copy_that_does_not_run_is_refused_in_one_line():
    """This forward asks its norm for something that an identity does not have."""
    model = Row(lambda m, x: m.norm(m.conv(x)) / m.norm.eps, conv=convolve(), norm=nn.BatchNorm2d(6))
    with pytest.raises(ConfigError, match="its copy does not run .*'Identity' object has no attribute 'eps'"):
        ecanet.optimize(lively(model), example=images(1, 9))


def test_ties_that_roundings_decide_prove_nothing():
    """Which of equal values comes first is left to rounding; the values are compared."""
    one, other = torch.ones(5, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)
    assert comparison.find_difference([one, other], [one, other.flip(0)], lambda: [one, other]) is None
    assert "off by" in comparison.find_difference([one, other], [one, other.flip(0)], lambda: [one, other.flip(0)])
    assert "no numbers" in comparison.find_difference([other], [other.flip(0)], lambda: [other])
    assert "returns 1 tensors" in comparison.find_difference([one], [one, one], lambda: [one, one])


def test_what_has_no_example_asks_for_one():
    model = lively(Row(lambda m, x, y=None: m.norm(m.conv(x["image"])), conv=convolve(), norm=nn.BatchNorm2d(6)))
    with pytest.raises(AttachError, match="pass example="):
        ecanet.optimize(model)
    assert ecanet.optimize(model, example=({"image": images(1, 9)},)).optimization.folded == ["norm"]


def test_a_network_that_asks_for_float32_is_compared_in_float32():
    model = Row(lambda m, x: m.norm(m.conv(x.to(torch.float32))), conv=convolve(), norm=nn.BatchNorm2d(6))
    assert ecanet.optimize(lively(model)).optimization.folded == ["norm"]


def test_the_report_survives_a_copy():
    fast = ecanet.optimize(lively(nn.Sequential(convolve(), nn.BatchNorm2d(6))))
    assert copy.deepcopy(fast).optimization == fast.optimization
