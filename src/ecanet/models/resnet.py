"""ResNets with an attention slot: torchvision's parameter names, plus the gate inside each block.

Each block puts its gate after the last norm of the residual branch, before the addition, as the paper does;
`placement` knows the attentions that stand elsewhere.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from ecanet.errors import check_int
from ecanet.models import placement
from ecanet.models.block import DescribesItself, Layer, Parts
from ecanet.models.execution import Stage, forward_block, normalize
from ecanet.models.network import FeatureInfo, FeatureNetwork, Level, Network
from ecanet.models.slots import Slot

BASIC, BOTTLENECK = "basic", "bottleneck"

LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": (BASIC, (2, 2, 2, 2)),
    "resnet34": (BASIC, (3, 4, 6, 3)),
    "resnet50": (BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (BOTTLENECK, (3, 4, 23, 3)),
    "resnet152": (BOTTLENECK, (3, 8, 36, 3)),
    "resnet8": (BASIC, (1, 1, 1)),
    "resnet14": (BASIC, (2, 2, 2)),
    "resnet20": (BASIC, (3, 3, 3)),
    "resnet56": (BASIC, (9, 9, 9)),
}
"""Block kind and blocks per stage; three stages mean the small-image network (3x3 stem, 16 to 64 channels)."""


class BasicBlock(DescribesItself):
    """Two 3x3 convolutions and a shortcut (ResNet-18, 34, 20, 56)."""

    expansion = 1
    conv3x3 = "conv1"

    def __init__(self, in_channels: int, width: int, stride: int, slot: Slot, stage: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.gate_key = slot.key
        self.add_module(slot.key, slot.build(width, stage))
        self.downsample = shortcut(in_channels, width, stride)

    @property
    def attention(self) -> nn.Module:
        """The gate, whatever its key: `eca`, `se`, …"""
        return self.get_submodule(self.gate_key)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, width, H / stride, W / stride)."""
        return forward_block(self, x)

    def parts(self) -> Parts:
        """Return what the block is made of."""
        branch = (Layer(self.conv1, self.bn1, self.relu), Layer(self.conv2, self.bn2, None))
        return Parts(branch, attention_in(self), self.downsample, self.relu)


class Bottleneck(DescribesItself):
    """1x1, 3x3 (with the stride, as in torchvision and the authors' code) and 1x1 convolutions, and a shortcut."""

    expansion = 4
    conv3x3 = "conv2"

    def __init__(self, in_channels: int, width: int, stride: int, slot: Slot, stage: int):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.gate_key = slot.key
        self.add_module(slot.key, slot.build(out_channels, stage))
        self.downsample = shortcut(in_channels, out_channels, stride)

    @property
    def attention(self) -> nn.Module:
        """The gate, whatever its key: `eca`, `se`, …"""
        return self.get_submodule(self.gate_key)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, 4 * width, H / stride, W / stride)."""
        return forward_block(self, x)

    def parts(self) -> Parts:
        """Return what the block is made of."""
        branch = (
            Layer(self.conv1, self.bn1, self.relu),
            Layer(self.conv2, self.bn2, self.relu),
            Layer(self.conv3, self.bn3, None),
        )
        return Parts(branch, attention_in(self), self.downsample, self.relu)


def attention_in(block: BasicBlock | Bottleneck) -> nn.Module | None:
    """Return the block's gate, None if it holds none."""
    return None if isinstance(block.attention, nn.Identity) else block.attention


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution and a norm where the branch changes shape."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResNet(Network):
    """Four stages after a 7x7 stem for images of about 224 px, or three after a 3x3 stem for 8 to 64 px."""

    def __init__(self, kind: str, layers: Sequence[int], slot: Slot, *, num_classes: int, in_channels: int):
        super().__init__()
        small = len(layers) == 3
        block = BasicBlock if kind == BASIC else Bottleneck
        channels = 16 if small else 64
        size, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        # the stem of a small-image network has the resolution of its first stage, so it is no level of its own
        self.feature_info = FeatureInfo([] if small else [Level(module="relu", num_chs=channels, reduction=2)])
        self.stages: list[str] = []
        width, reduction = channels, 1 if small else 4
        for stage, depth in enumerate(layers):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(depth):
                stride = placement.choose_stride(slot, stage, len(layers)) if index == 0 else 1
                here = block(channels, width, stride, placement.choose_slot(slot, index, depth), stage)
                placement.augment(slot, stage, here, block.conv3x3)
                blocks[str(index)] = here
                channels, reduction = width * block.expansion, reduction * stride
                if placement.follows_block(slot, stage, index, depth):
                    blocks[f"{index}_{slot.key}"] = slot.build(channels, stage)  # torchvision's names stay as they are
            name = f"layer{stage + 1}"
            self.add_module(name, Stage(blocks))
            self.stages.append(name)
            self.feature_info.append(Level(module=name, num_chs=channels, reduction=reduction))
            width *= 2
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.reset_classifier(num_classes)
        initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to the last feature map (N, num_features, h, w)."""
        x = self.maxpool(normalize(self.conv1(x), self.bn1, self.relu))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to the feature maps of the stem (large networks) and of every stage."""
        x = normalize(self.conv1(x), self.bn1, self.relu)
        levels = [] if isinstance(self.maxpool, nn.Identity) else [x]
        x = self.maxpool(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
            levels.append(x)
        return levels

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a feature map (N, num_features, h, w); with ``pre_logits`` only pool it."""
        x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """Return ``fc``."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace ``fc`` by a new layer for ``num_classes``; 0 removes it."""
        self.num_classes = check_int("num_classes", num_classes, least=0)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def drop_after(self, level: Level) -> None:
        """Remove the head and the stages after ``level``; without stages the pool of the stem goes, too."""
        last = self.stages.index(level["module"]) + 1 if level["module"] in self.stages else 0
        for name in ("avgpool", "fc", *self.stages[last:]):
            delattr(self, name)
        self.stages = self.stages[:last]


class ResNetFeatures(FeatureNetwork, ResNet):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A ResNet that returns its feature maps."""


def initialize(model: nn.Module) -> None:
    """As in the authors' code: convolutions N(0, 2 / (k k out)), norms 1 and 0; gates and linear keep torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
