"""Costs of the paper's detectors in the units of its Table 5: trainable parameters, and operations of one image.

The operations follow mmdetection's counter of 2019. It runs the backbone, the pyramid and the heads on an image of
1280 x 800, the box head on 1,000 regions and the mask head on 100. It counts

- one for each multiply-accumulate and each added bias of a convolution. A transposed convolution counts like an
  ordinary one with the same output, which is four times its work;
- 2 for each element of a batch norm, 1 for each output of a ReLU, and 1 for each element that enters a pool;
- the product of input and output sizes for a linear layer.

It sees modules only. So the sigmoids, products, additions and upsampling steps that are functions count nothing, and
neither does the ReLU of the region proposals, which is a function in that library.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead  # pyright: ignore[reportMissingTypeStubs]

from ecanet.attention import ECA, ChannelAttention
from ecanet.models import create_detector
from ecanet.recipes import DetectorConfig, ModelConfig
from ecanet.studies.shapes import run_on_shapes

__all__ = ["WHY", "DetectorCost", "count_detector", "count_operations"]

WHY = (
    "#Param: trainable parameters in units of 10^6; the stem and the first stage are frozen with their gates. GFLOPs: "
    "units of 10^9 at 1280 x 800, by the rules of mmdetection's counter of 2019, with 1,000 regions for the box head "
    "and 100 for the mask head; batch norms, ReLUs and pools count, a transposed convolution counts four times. Nearly "
    "all that an attention adds is its average pool."
)

HEIGHT, WIDTH = 800, 1280


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorCost:
    """The cost of a detector for one image."""

    trainable: int
    """Parameters that are trained."""
    parameters: int
    """All parameters."""
    operations: int
    """Operations by the rules of Table 5."""


def count_detector(model: ModelConfig, detector: DetectorConfig) -> DetectorCost:
    """Return the cost of the detector ``model.name`` over ``detector.backbone``.

    The gates of the frozen stages are not counted as trainable, as in the paper. Only shapes are computed, on the meta
    device.

    >>> count_detector(ModelConfig(name="retinanet", attention="none"), DetectorConfig(backbone="resnet50"))
    DetectorCost(trainable=37743348, parameters=37968692, operations=239316500520)
    """
    with torch.device("meta"), torch.no_grad():
        network = create_detector(
            model.name,
            detector.backbone,
            attention=model.attention,
            kernel_sizes=model.kernel_sizes,
            freeze_attention=True,
            **model.options,
        ).eval()
        counts: list[int] = []

        def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            counts.append(count_operations(module, args[0], out))

        for module in _counted_modules(network):
            module.register_forward_hook(count)
        run_on_shapes(network, (3, HEIGHT, WIDTH))
    return DetectorCost(
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in network.parameters()),
        operations=sum(counts),
    )


def count_operations(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Return the operations of one call of ``module``, from ``x`` to ``out``, by the rules of this file.

    >>> count_operations(nn.ConvTranspose2d(2, 3, 2, 2), torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 8, 8))
    1728
    """
    match module:
        case TwoMLPHead():  # mmdetection's box head has two ReLU modules; torchvision's calls a function
            return 2 * out.numel()
        case ChannelAttention():
            return x.numel() + len(x) * _count_gate(module)
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


def _count_gate(gate: ChannelAttention) -> int:
    """Return the operations of the layers between the pool and the sigmoid, for one image."""
    if isinstance(gate, ECA):
        return gate.channels * gate.kernel_size
    layers = [layer for layer in gate.modules() if isinstance(layer, nn.Linear)]
    relus = sum(layer.out_features for layer in layers[:-1])  # one after each layer but the last
    return sum(layer.weight.numel() for layer in layers) + relus


def _has_proposals(network: nn.Module) -> bool:
    """Return whether the detector is a Faster or Mask R-CNN, and not a RetinaNet."""
    return hasattr(network, "rpn")


def _counted_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules that are counted: gates as a whole, and no ReLU of the region proposals."""
    modules = list(network.modules())
    hidden = {inner for m in modules if isinstance(m, ChannelAttention) for inner in m.modules() if inner is not m}
    if _has_proposals(network):
        hidden |= {m for m in network.get_submodule("rpn.head").modules() if isinstance(m, nn.ReLU)}
    return [m for m in modules if m not in hidden]
