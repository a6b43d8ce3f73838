"""Inverted residual blocks are known by their structure, whatever their class is called."""

import torch
from torch import nn

import ecanet


class Layer(nn.Module):
    """A convolution, a norm and an activation, as Hugging Face's MobileNetV2 groups them."""

    def __init__(self, inputs, outputs, size=1, stride=1, groups=1, act=True):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU6() if act else None

    def forward(self, x):
        x = self.normalization(self.convolution(x))
        return x if self.activation is None else self.activation(x)


class Inverted(nn.Module):
    """A block of Hugging Face's MobileNetV2."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.expand, self.reduce = Layer(inputs, 4 * inputs), Layer(4 * inputs, outputs, act=False)
        self.conv = Layer(4 * inputs, 4 * inputs, 3, stride, 4 * inputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.reduce(self.conv(self.expand(x)))
        return x + y if self.residual else y


class Stem(nn.Module):
    """Its stem: a convolution, and a block without expansion."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.reduce = Layer(3, 16, 3, 2), Layer(16, 16, 3, 1, 16), Layer(16, 8, act=False)

    def forward(self, x):
        return self.reduce(self.conv(self.first(x)))


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return torch.mul(x, self.expand(nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid())


class Final(nn.Module):
    """The end of a block of Hugging Face's EfficientNet, in which the addition stands."""

    def __init__(self, inputs, outputs, residual):
        super().__init__()
        self.project_conv, self.project_bn = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.dropout, self.residual = nn.Dropout(0.1), residual

    def forward(self, shortcut, x):
        x = self.project_bn(self.project_conv(x))
        return self.dropout(x) + shortcut if self.residual else x


class MBBlock(nn.Module):
    """A block of Hugging Face's EfficientNet."""

    def __init__(self, inputs, outputs, stride=1, ratio=4, residual=False):
        super().__init__()
        width = inputs * ratio
        self.expansion = Layer(inputs, width) if ratio > 1 else None
        self.depthwise, self.excite = Layer(width, width, 3, stride, width), Excite(width)
        self.projection = Final(width, outputs, residual)

    def forward(self, x):
        y = x if self.expansion is None else self.expansion(x)
        return self.projection(x, self.excite(self.depthwise(y)))


class Fused(Inverted):
    """A block of EfficientNetV2, whose first convolution expands and is not depthwise."""

    def forward(self, x):
        y = self.reduce(self.full(x))
        return x + y if self.residual else y

    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, stride)
        self.full = Layer(inputs, 4 * inputs, 3, stride)


class Separable(nn.Module):
    """A depthwise and a 1 x 1 convolution, as in Xception."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.depthwise, self.pointwise = Layer(inputs, inputs, 3, 1, inputs), Layer(inputs, outputs, act=False)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


class Bottleneck(nn.Module):
    """A residual block that is not inverted."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


def places(*modules):
    model = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.rand(2, 3, 16, 16)
    before = model(x)
    ecanet.attach(model, example=x)
    assert torch.equal(model(x), before)
    return [(site.after, site.channels) for site in ecanet.attached(model)]


def test_every_inverted_residual_block_gets_a_gate_with_or_without_an_addition():
    assert places(Stem(), Inverted(8, 8), Inverted(8, 12, 2), Inverted(12, 12), Inverted(12, 20), Layer(20, 40)) == [
        ("0.reduce", 8), ("1.reduce", 8), ("2.reduce", 12), ("3.reduce", 12), ("4.reduce", 20)
    ]  # fmt: skip
    blocks = MBBlock(16, 8, ratio=1), MBBlock(8, 12, 2), MBBlock(12, 12, residual=True), MBBlock(12, 20), Layer(20, 80)
    assert places(Layer(3, 16, 3, 2), *blocks) == [
        ("1.projection", 8), ("2.projection", 12), ("3.projection.project_bn", 12), ("4.projection", 20)
    ]  # fmt: skip
    assert [name for name, _ in places(Layer(3, 8, 3), Fused(8, 8), Fused(8, 12, 2), Inverted(12, 16))] == [
        "1.reduce", "2.reduce", "3.reduce"
    ]  # fmt: skip


def test_blocks_of_other_networks_need_an_addition():
    # There is no inverted residual block, and then one block that widens.
    assert [name for name, _ in places(Layer(3, 8), Bottleneck(), Separable(8, 4))] == ["1.conv2"]
    assert [name for name, _ in places(Layer(3, 8), Inverted(8, 8), Separable(8, 16))] == ["1.reduce"]
    narrowing = nn.Sequential(Layer(8, 4), Layer(4, 4, 3), Layer(4, 16, act=False))  # ResNet's bottleneck
    found = places(Layer(3, 8), Inverted(8, 8), narrowing, Layer(16, 16, 3, 1, 16), Layer(16, 8), Inverted(8, 8))
    assert [name for name, _ in found] == ["1.reduce", "5.reduce"]
