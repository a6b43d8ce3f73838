"""MobileNetV2 with an attention slot, in the authors' names (`features.N.conv.M.conv.weight`).

The gate is the last entry of every block's `conv`, after the projection's norm, in all 17 blocks: the 10 with an
addition and the 7 without. The rest has torchvision's names.
"""

from torch import Tensor, nn

from ecanet.errors import check_int
from ecanet.models.network import FeatureInfo, FeatureNetwork, Level, Network
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
            self.gate_key = f"conv.{len(layers)}"
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


class MobileNetV2(Network):
    """MobileNetV2 of width 1; dropout 0.25 before the classifier, as in the authors' code."""

    def __init__(self, slot: Slot, *, num_classes: int, in_channels: int):
        super().__init__()
        channels, reduction = 32, 2
        features: list[nn.Module] = [conv_norm_relu(in_channels, channels, 3, 2)]
        self.feature_info = FeatureInfo()
        for stage, (expansion, out_channels, blocks, first_stride) in enumerate(SETTINGS):
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                features.append(InvertedResidual(channels, out_channels, stride, expansion, slot, stage))
                channels, reduction = out_channels, reduction * stride
                level = Level(module=f"features.{len(features) - 1}", num_chs=channels, reduction=reduction)
                if self.feature_info and self.feature_info[-1]["reduction"] == reduction:
                    self.feature_info.pop()  # a level is the last block of its resolution
                self.feature_info.append(level)
        self.level_ends = [int(name.removeprefix("features.")) for name in self.feature_info.module_name()]
        self.num_features = 1280
        features.append(conv_norm_relu(channels, self.num_features, 1))
        self.features = nn.Sequential(*features)
        self.reset_classifier(num_classes)
        initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to the last feature map (N, num_features, h, w)."""
        return self.features(x)

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to the feature maps of the last block of each resolution."""
        levels: list[Tensor] = []
        for index, module in enumerate(self.features):
            x = module(x)
            if index in self.level_ends:
                levels.append(x)
        return levels

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a feature map (N, num_features, h, w); with ``pre_logits`` only pool it."""
        x = x.mean((2, 3))
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer in ``classifier``, or an identity where there is none."""
        return self.classifier[1] if isinstance(self.classifier, nn.Sequential) else self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace ``classifier``, dropout and a linear layer, by a new one for ``num_classes``; 0 removes it."""
        self.num_classes = check_int("num_classes", num_classes, least=0)
        linear = nn.Linear(self.num_features, num_classes) if num_classes else None
        self.classifier = nn.Identity() if linear is None else nn.Sequential(nn.Dropout(0.25), linear)
        if linear is not None:
            nn.init.normal_(linear.weight, 0, 0.01)
            nn.init.zeros_(linear.bias)

    def drop_after(self, level: Level) -> None:
        """Remove the head and the blocks after ``level``."""
        del self.classifier
        last = int(level["module"].removeprefix("features."))
        self.features = nn.Sequential(*list(self.features)[: last + 1])


class MobileNetV2Features(FeatureNetwork, MobileNetV2):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A MobileNetV2 that returns its feature maps."""


def initialize(model: nn.Module) -> None:
    """As in the authors' code: convolutions Kaiming fan-out, linear N(0, 0.01) with zero bias; gates keep torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
