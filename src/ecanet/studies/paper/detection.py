"""What the paper's detectors cost, in the units of its Table 5: trainable parameters, and operations of one image.

The column follows mmdetection's counter of 2019. It runs backbone, pyramid and heads on an image of 1280 x 800, the box
head on 1,000 regions and the mask head on 100, and counts one per multiply-accumulate and per bias of a convolution (a
transposed one as if it were an ordinary one of its output, four times its work), 2 per element of a batch norm, 1 per
element of a ReLU and per element that goes into a pool, and in x out for a linear layer. Functions are not seen:
sigmoids, products, additions, upsampling, and in that library the ReLU of the region proposals.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from ecanet.attention import ECA, ChannelAttention
from ecanet.models import create_detector
from ecanet.studies.paper.rows import Network

__all__ = ["WHY", "DetectorCost", "detector_cost", "operations"]

WHY = (
    "#Param: trainable parameters in units of 10^6; the stem and the first stage are frozen with their gates. GFLOPs: "
    "units of 10^9 at 1280 x 800, by the rules of mmdetection's counter of 2019, with 1,000 regions for the box head "
    "and 100 for the mask head; batch norms, ReLUs and pools count, a transposed convolution counts four times. What "
    "an attention adds is nearly all its average pool."
)

HEIGHT, WIDTH = 800, 1280
BOX_REGIONS, MASK_REGIONS = 1000, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorCost:
    """What one detector costs for one image."""

    trainable: int
    parameters: int
    """All, the frozen ones too."""
    operations: int
    """As counted for Table 5."""


def detector_cost(network: Network) -> DetectorCost:
    """The cost of the row's detector; only shapes are computed, on the meta device.

    >>> detector_cost(Network(name="resnet50", detector="retinanet"))
    DetectorCost(trainable=37743348, parameters=37968692, operations=239316500520)
    """
    with torch.device("meta"), torch.no_grad():
        model: Any = create_detector(
            network.detector,
            network.name,
            attention=network.attention,
            kernel_sizes=network.kernel_sizes,
            freeze_attention=True,
            **network.options,
        ).eval()
        counted: list[int] = []
        for module in _seen(model):
            module.register_forward_hook(lambda m, args, out: counted.append(operations(m, args[0], out)))
        _pass(model)
    return DetectorCost(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        operations=sum(counted),
    )


def operations(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Operations of one call of ``module``, from ``x`` to ``out``, by the rules above.

    >>> operations(nn.ConvTranspose2d(2, 3, 2, 2), torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 8, 8))
    1728
    """
    match module:
        case TwoMLPHead():  # two ReLUs, functions here and modules there
            return 2 * out.numel()
        case ChannelAttention():
            return x.numel() + len(x) * _gate_operations(module)
        case nn.Conv1d() | nn.Conv2d() | nn.ConvTranspose2d():
            positions = out.numel() // out.shape[1]
            return positions * (module.weight.numel() + (0 if module.bias is None else module.out_channels))
        case nn.BatchNorm2d():
            return 2 * x.numel()
        case nn.ReLU():
            return out.numel()
        case nn.MaxPool2d() | nn.AdaptiveAvgPool2d():
            return x.numel()
        case nn.Linear():
            return len(x) * module.weight.numel()
        case _:
            return 0


def _gate_operations(gate: ChannelAttention) -> int:
    """Those of the layers between pool and sigmoid, for one image."""
    if isinstance(gate, ECA):
        return gate.channels * gate.kernel_size
    layers = [layer for layer in gate.modules() if isinstance(layer, nn.Linear)]
    # a ReLU after each layer but the last
    return sum(layer.weight.numel() for layer in layers) + sum(layer.out_features for layer in layers[:-1])


def _seen(model: Any) -> list[nn.Module]:
    """The modules that the counter listens to: not a gate's layers, and not the ReLU of the region proposals."""
    unseen = {part for m in model.modules() if isinstance(m, ChannelAttention) for part in m.modules() if part is not m}
    if hasattr(model, "rpn"):
        unseen |= {m for m in model.rpn.head.modules() if isinstance(m, nn.ReLU)}
    return [m for m in model.modules() if m not in unseen]


def _pass(model: Any) -> None:
    """One image through backbone, pyramid and heads, without choosing regions: where they lie costs nothing."""
    levels = list(model.backbone(torch.empty(1, 3, HEIGHT, WIDTH)).values())
    if not hasattr(model, "rpn"):
        model.head(levels)
        return
    model.rpn.head(levels)
    width, heads = model.backbone.out_channels, model.roi_heads
    heads.box_predictor(heads.box_head(torch.empty(BOX_REGIONS, width, 7, 7)))
    if heads.has_mask():
        heads.mask_predictor(heads.mask_head(torch.empty(MASK_REGIONS, width, 14, 14)))
