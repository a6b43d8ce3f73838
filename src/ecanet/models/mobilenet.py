"""MobileNetV2 with an attention slot, in the authors' names (`features.N.conv.M.conv.weight`).

The gate is the last entry of every block's `conv`, after the projection's norm, in all 17 blocks: the 10 with an
addition and the 7 without. The rest has torchvision's names.
"""

from torch import Tensor, nn

from ecanet.models.slots import Slot

SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""One stage each: expansion, output channels, blocks, stride of the first block."""


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection, gate; added to its input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, slot: Slot, stage: int):
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [conv_norm_relu(in_channels, hidden, 1)]
        layers += [
            conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        if slot.name != "none":
            layers.append(slot.build(out_channels, stage))
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H / stride, W / stride)."""
        return x + self.conv(x) if self.residual else self.conv(x)


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1; dropout 0.25 before the classifier, as in the authors' code."""

    def __init__(self, slot: Slot, *, num_classes: int, in_channels: int):
        super().__init__()
        channels = 32
        features: list[nn.Module] = [conv_norm_relu(in_channels, channels, 3, 2)]
        for stage, (expansion, out_channels, blocks, first_stride) in enumerate(SETTINGS):
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                features.append(InvertedResidual(channels, out_channels, stride, expansion, slot, stage))
                channels = out_channels
        features.append(conv_norm_relu(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.25), nn.Linear(1280, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> logits (N, num_classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


def initialize(model: nn.Module) -> None:
    """As in the authors' code: convolutions Kaiming fan-out, linear N(0, 0.01) with zero bias; gates keep torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    classifier = model.get_submodule("classifier.1")
    assert isinstance(classifier, nn.Linear)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
