"""The modules that scale channels in any network, the layers beside them, and constants that move into these."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import ecanet
from ecanet.attention import ASR, ECA, SE
from ecanet.surgery import find_scalings


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model):
    """Give gates and norms values that no rule for neutral ones could hide in."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.data *= 0.1  # signals stay large through many random layers
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model.double().eval().requires_grad_(False)


class Row(nn.Sequential):
    """Layers in a row, and the mean over the positions."""

    def forward(self, x):
        return super().forward(x).mean((2, 3))


def act_then_gate(padding=0, groups=1, bias=True):
    gate = SE(4, 2)
    return Row(nn.Conv2d(3, 4, 3), nn.ReLU(), gate, nn.Conv2d(4, 6, 3, padding=padding, groups=groups, bias=bias))


def attach(model, name="eca"):
    ecanet.attach(model, name, preserve=False, example=image(1, 3, 64, 64))
    return model


class Sum(nn.Module):
    """x + x g(x), in operations that a symbolic trace sees."""

    def __init__(self, *, swapped=False):
        super().__init__()
        self.conv, self.fc, self.swapped = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), swapped

    def forward(self, x):
        y = self.conv(x)
        product = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        return torch.relu(product + y if self.swapped else torch.add(y, product)).mean((2, 3))


class SumTwice(Sum):
    """The sum is the product's second reader."""

    def forward(self, x):
        y = self.conv(x)
        product = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        return (torch.relu(y + product) + product).mean((2, 3))


class SumInPlace(Sum):
    """The sum changes one of the two, which is read afterwards."""

    def forward(self, x):
        y = self.conv(x)
        product = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        total = product.add_(y) if self.swapped else y.add_(product)
        return (torch.relu(total) + y).mean((2, 3))


NETWORKS = {  # how it is built, the side of its images, and the number of its gates
    "resnet8, eca built in": (lambda: ecanet.create_model("resnet8", num_classes=5), 16, 3),
    "resnet8, se built in": (lambda: ecanet.create_model("resnet8", attention="se", num_classes=5), 16, 3),
    "resnet8, asr built in": (lambda: ecanet.create_model("resnet8", attention="asr", num_classes=5), 16, 3),
    "mobilenet_v2, eca built in": (lambda: ecanet.create_model("mobilenet_v2", num_classes=5), 32, 17),
    "resnet18, eca attached": (lambda: attach(torchvision.models.resnet18(num_classes=5)), 32, 8),
    "mobilenet_v3_small, its own se": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 32, 9),
    "traced resnet8, eca attached": (
        lambda: attach(torch.fx.symbolic_trace(ecanet.create_model("resnet8", attention="none", num_classes=5))),
        16,
        3,
    ),
    "traced mobilenet_v3_small, its own se": (
        lambda: torch.fx.symbolic_trace(torchvision.models.mobilenet_v3_small(num_classes=5)),
        32,
        9,
    ),
    "norm, gate, activation": (lambda: Row(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ECA(4), nn.ReLU()), 8, 1),
    "convolution without bias, gate": (lambda: Row(nn.Conv2d(3, 4, 3, bias=False), SE(4, 2), nn.ReLU()), 8, 1),
    "group norm, gate": (lambda: Row(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), ASR(4, 1), nn.ReLU()), 8, 1),
    "activation, gate, convolution": (act_then_gate, 8, 1),
    "activation, gate, padded convolution": (lambda: act_then_gate(padding=1), 8, 1),
    "traced, y + y g(y)": (lambda: torch.fx.symbolic_trace(Sum()), 8, 1),
    "traced, y g(y) + y": (lambda: torch.fx.symbolic_trace(Sum(swapped=True)), 8, 1),
    "activation, gate, grouped convolution": (lambda: act_then_gate(groups=2, bias=False), 8, 1),
}
SLOW = ("mobilenet_v2, eca built in", "resnet18, eca attached", "traced mobilenet_v3_small, its own se")
ALL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)


class Affine(nn.Module):
    """The meaning of a constant: each channel times a number, plus a number."""

    def __init__(self, scale, bias):
        super().__init__()
        self.scale, self.bias = scale, bias

    def forward(self, x, mask=None):
        return torch.stack([self.scale[c] * x[:, c] + self.bias[c] for c in range(x.shape[1])], 1)


def find_difference(a, b):
    """Return the largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def count_channels(model, scaling, x):
    seen = []
    handle = scaling.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model(x)
    handle.remove()
    return seen[0]


@ALL
def test_a_constant_moves_into_the_layer_beside_it(name):
    build, side, count = NETWORKS[name]
    torch.manual_seed(0)
    model = randomize(build())
    x = image(2, 3, side, side).double()
    with find_scalings(model, x[:1]) as scalings:
        assert len(scalings) == count
        assert [one.obstacle for one in scalings] == [""] * count
        for seed, one in enumerate(scalings):
            channels = count_channels(model, one, x)
            scale, bias = image(channels, seed=seed).double(), image(channels, seed=100 + seed).double()
            if not one.before and not one.takes_bias:
                bias = torch.zeros_like(bias)
            before = model(x)
            one.put(model, Affine(scale, bias))
            constant = model(x)
            assert find_difference(constant, before) > 1e-4
            keys = set(model.state_dict())
            one.absorb(model, scale, bias)
            assert find_difference(model(x), constant) < 1e-9
            added = set(model.state_dict()) - keys  # a convolution without a bias has one now
            assert all(key.endswith(".bias") for key in added)
    assert not any(isinstance(module, ECA | SE | ASR | Affine) for module in model.modules())
    if "attached" in name:
        assert ecanet.attached(model) == []


@ALL
def test_a_gate_that_is_held_at_zero_changes_the_output(name):
    """Constants act: where a gate is put to zero the branch is gone, and only there."""
    build, side, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = randomize(build())
    x = image(2, 3, side, side).double()
    before = model(x)
    with find_scalings(model, x) as scalings:
        for one in scalings:
            one.put(model, Affine(*2 * [torch.zeros(count_channels(model, one, x)).double()]))
            assert find_difference(model(x), before) > 1e-4
            one.put(model, one.module)
            assert torch.equal(model(x), before)
    assert torch.equal(model(x), before)


class Fork(nn.Module):
    """Another operation reads what the gate reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.relu = nn.Conv2d(3, 4, 3), ECA(4), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return (self.relu(self.gate(y)) + y.square()).mean((2, 3))


class Twice(Fork):
    def forward(self, x):
        return self.relu(self.gate(self.gate(self.conv(x)))).mean((2, 3))


class Shared(Fork):
    """The convolution before the gate has the weight of another one."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return (self.relu(self.gate(self.conv(x))) + self.other(x)).mean((2, 3))


class Again(Fork):
    """The convolution before the gate runs a second time."""

    def forward(self, x):
        return (self.relu(self.gate(self.conv(x))) + self.conv(-x)).mean((2, 3))


class Ends(Fork):
    def forward(self, x):
        return self.gate(self.relu(self.conv(x)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Fork, "another operation reads its input too, and no convolution alone reads its output"),
        (Twice, "it runs 2 times for an image"),
        (Shared, "'conv' shares its weight with another module, and no convolution alone reads its output"),
        (Again, "'conv' beside it runs several times, and no convolution alone reads its output"),
        (Ends, "no norm or convolution is before it, and no convolution alone reads its output"),
        (
            lambda: torch.fx.symbolic_trace(SumTwice()),
            "another operation reads its input too, and no convolution alone reads its output",
        ),
        (lambda: Row(nn.Conv2d(3, 4, 1), ecanet.make_attention("cbam", 4)), "it is not one factor for a channel"),
        (
            lambda: Row(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), ECA(4), nn.ReLU()),
            "'1' has no weight, and no convolution alone reads its output",
        ),
    ],
)
def test_what_is_in_the_way_is_said(build, reason):
    with find_scalings(build().eval(), image(2, 3, 8, 8)) as scalings:
        assert [one.obstacle for one in scalings] == [reason]


class Maximum(Sum):
    """Another operation than a sum is behind the product."""

    def forward(self, x):
        y = self.conv(x)
        product = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        return torch.maximum(product, y).mean((2, 3))


def test_another_operation_on_the_product_is_no_sum():
    model, x = torch.fx.symbolic_trace(Maximum()).eval(), image(2, 3, 8, 8)
    with find_scalings(model, x) as scalings:
        (product,) = scalings
        assert "another operation reads its input too" in product.obstacle
        names = [node.name for node in product.module.graph.nodes]
        assert names == ["x", "mean", "fc", "sigmoid", "mul", "output"]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_in_place_stays_where_it_is(swapped):
    model, x = torch.fx.symbolic_trace(SumInPlace(swapped=swapped)).eval(), image(2, 3, 8, 8)
    before = model(x)
    with find_scalings(model, x) as scalings:
        assert scalings == []
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("build", "count"), [(lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 9), (Sum, 1), (SumTwice, 1)]
)
def test_graphs_are_as_before_when_nothing_was_folded(build, count):
    model = torch.fx.symbolic_trace(build()).eval()
    keys, nodes = list(model.state_dict()), [str(node) for node in model.graph.nodes]
    x = image(2, 3, 32, 32)
    before = model(x)
    with find_scalings(model, x) as scalings:
        assert len(scalings) == count
    assert list(model.state_dict()) == keys
    assert len(list(model.graph.nodes)) == len(nodes)
    assert torch.equal(model(x), before)


def test_training_a_folded_network_trains_what_took_the_constant():
    model = ecanet.create_model("resnet8", attention="asr", num_classes=5).eval()
    copied, x = copy.deepcopy(model), image(2, 3, 16, 16)
    with find_scalings(copied, x) as scalings:
        for one in scalings:
            channels = one.module.channels
            one.absorb(copied, one.module.weigh(torch.zeros(1, channels))[0], None)
    torch.testing.assert_close(copied(x), model(x), rtol=1e-5, atol=1e-5)
    plain = ecanet.create_model("resnet8", attention="none", num_classes=5)
    plain.load_state_dict(copied.state_dict())
    copied.train()(x).sum().backward()
    assert copied.layer1[0].bn2.weight.grad.any()
