"""Faster R-CNN, Mask R-CNN and RetinaNet with a feature pyramid, over any network of this library.

The detectors are torchvision's, with torchvision's parameter names. This file makes the backbone: its gates, its frozen
parts, the behaviour of its norms, and its weights. Labels count from 1 in all three detectors; 0 is the background.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ecanet.attention import Attention, AttentionLike, find_attention
from ecanet.errors import ConfigError, check_positive_int
from ecanet.models.factory import create_model
from ecanet.models.kernel_sizes import KernelSizes
from ecanet.models.resnet import ResNet

__all__ = ["DETECTORS", "Norm", "create_detector", "faster_rcnn", "mask_rcnn", "retinanet"]

Norm = Literal["eval", "frozen", "train"]

DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet")

MOBILENET_LEVELS = {"3": 24, "6": 32, "13": 96, "17": 320}
"""Channels of the last block before each halving of MobileNetV2, by its index in ``features``."""

SMALL_NORM = partial(nn.GroupNorm, 8)
"""The norm between the convolutions of small pyramids and heads. Without it, training from scratch takes far longer."""

SMALL_PROPOSALS: dict[str, Any] = {
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": 60,
    "rpn_post_nms_top_n_test": 50,
    "rpn_batch_size_per_image": 128,
    "box_batch_size_per_image": 20,
    "box_positive_fraction": 0.4,
    "box_detections_per_img": 20,
}


def create_detector(
    name: str,
    backbone: str = "resnet50",
    *,
    num_classes: int = 80,
    attention: AttentionLike = "eca",
    kernel_sizes: KernelSizes = "adaptive",
    weights: "str | Path | WeightsEnum | None" = None,
    norm: Norm = "eval",
    frozen_stages: int = 1,
    freeze_attention: bool = False,
    small: bool = False,
    short_side: int = 800,
    scales: Sequence[int] = (),
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    **options: object,
) -> nn.Module:
    """Build "faster_rcnn", "mask_rcnn" or "retinanet" over the network called ``backbone``.

    Call it as you call torchvision's detectors: with a list of images (3, H, W) between 0 and 1 and, while training, a
    list of targets with ``boxes`` (N, 4), ``labels`` (N,) from 1 to ``num_classes`` and, for Mask R-CNN, ``masks``
    (N, H, W). It returns losses by name while training, and detections otherwise.

    Args:
        name: the detector's name.
        backbone: a name that `ecanet.create_model` takes.
        num_classes: number of kinds of objects, without the background.
        attention: the gate in every block, as in `ecanet.create_model`.
        kernel_sizes: as in `ecanet.create_model`.
        weights: weights of the backbone, as in `ecanet.create_model`; the detector's ``load_report`` says what matched.
        norm: "eval" keeps the backbone's norms at their stored statistics and trains their weights and biases, as the
            paper's recipe does; "frozen" trains neither; "train" uses ordinary batch norms.
        frozen_stages: number of stages that are not trained, with the stem; 0 trains all. Gates are trained everywhere.
        freeze_attention: do not train the gates of the frozen stages either, as the paper counts its parameters.
        small: use a narrow pyramid and heads, few proposals and small anchors, for images of about 128 pixels.
        short_side: length in pixels to which an image's short side is resized; its long side becomes at most 5/3 of it.
        scales: more short sides, of which training draws one for each image; the long side is then at most 5/3 of the
            largest.
        mean: means of the images' channels, for normalisation.
        std: standard deviations of the images' channels.
        **options: options of the attention.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = create_detector("faster_rcnn", attention="none")
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    41531812

    Raises:
        ConfigError: a name or setting does not exist or does not fit.
        CheckpointError: the weights cannot be had, or are not this backbone's.
    """
    if name not in DETECTORS:
        raise ConfigError(f"unknown detector {name!r}; choose one of {', '.join(DETECTORS)}")
    if norm not in ("eval", "frozen", "train"):
        raise ConfigError(f"norm must be 'eval', 'frozen' or 'train', got {norm!r}")
    num_classes = check_positive_int("num_classes", num_classes)
    arguments = inspect.signature(create_detector).parameters
    find_attention(attention).check(options, arguments)
    gates: dict[str, Any] = {"attention": attention, "kernel_sizes": kernel_sizes, **options}
    network = create_model(backbone, weights=weights, **gates)
    sides = (*scales, short_side)
    if min(sides) < 1:
        raise ConfigError(f"short_side and scales must be positive, got {short_side!r} and {tuple(scales)!r}")
    pyramid = Pyramid(
        network,
        levels=_levels(name, network, small),
        out_channels=48 if small else 256,
        p6_p7=name == "retinanet",
        norm=norm,
        frozen_stages=frozen_stages,
        freeze_attention=freeze_attention,
        pyramid_norm=SMALL_NORM if small else None,
    )
    shape = {
        "min_size": sides,
        "max_size": round(max(sides) * 5 / 3),
        "image_mean": list(mean),
        "image_std": list(std),
    }
    builder = _retinanet if name == "retinanet" else _rcnn
    detector = builder(name, pyramid, num_classes, small, shape)
    vars(detector)["load_report"] = vars(network)["load_report"]
    return detector


def faster_rcnn(backbone: str = "resnet50", **settings: Any) -> nn.Module:
    """Build Faster R-CNN with a feature pyramid; ``settings`` are those of `create_detector`."""
    return create_detector("faster_rcnn", backbone, **settings)


def mask_rcnn(backbone: str = "resnet50", **settings: Any) -> nn.Module:
    """Build Mask R-CNN with a feature pyramid; ``settings`` are those of `create_detector`."""
    return create_detector("mask_rcnn", backbone, **settings)


def retinanet(backbone: str = "resnet50", **settings: Any) -> nn.Module:
    """Build RetinaNet, whose P6 is computed from C5; ``settings`` are those of `create_detector`."""
    return create_detector("retinanet", backbone, **settings)


# the backbone


class Pyramid(BackboneWithFPN):
    """A network's stages and a feature pyramid on them, with the stages and norms that are not trained."""

    def __init__(
        self,
        network: nn.Module,
        *,
        levels: dict[str, int],
        out_channels: int,
        p6_p7: bool,
        norm: Norm,
        frozen_stages: int,
        freeze_attention: bool,
        pyramid_norm: Callable[..., nn.Module] | None,
    ):
        stages = list(stages_of(network))
        used = stages.index(list(levels)[-1]) + 1
        if not 0 <= frozen_stages <= used:
            raise ConfigError(f"frozen_stages must be 0 to {used}, which this detector uses, got {frozen_stages!r}")
        if isinstance(network, ResNet) and len(stages) == 3:
            # the stem of a small-image ResNet keeps the image's size; here it halves it twice, as in the large ones
            network.conv1.stride = (2, 2)
            network.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = list(levels.values())
        super().__init__(
            network if isinstance(network, ResNet) else network.get_submodule("features"),
            return_layers={name: str(number) for number, name in enumerate(levels)},
            in_channels_list=widths,
            out_channels=out_channels,
            extra_blocks=LastLevelP6P7(widths[-1], out_channels) if p6_p7 else LastLevelMaxPool(),
            norm_layer=pyramid_norm,
        )
        self.norm = norm
        names = [name for name, _ in self.body.named_children()]
        self.frozen = names[: names.index(stages[frozen_stages - 1]) + 1] if frozen_stages else []
        self._freeze(freeze_attention)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Pyramid":
        """Set the mode of all modules except the norms that keep their statistics."""
        super().train(mode)
        for name, child in self.body.named_children():
            if self.norm != "train" or name in self.frozen:
                for module in child.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
        return self

    def _freeze(self, freeze_attention: bool) -> None:
        gates = {id(p) for m in self.body.modules() if isinstance(m, Attention) for p in m.parameters()}
        for name, parameter in self.body.named_parameters():
            gate_stays = id(parameter) in gates and not freeze_attention
            if name.split(".")[0] in self.frozen and not gate_stays:
                parameter.requires_grad_(False)
        if self.norm == "frozen":
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)


def stages_of(network: nn.Module) -> dict[str, int]:
    """Return the names of the modules that end the stages of ``network``, finest first, with their channels."""
    if isinstance(network, ResNet):
        levels = network.feature_info[-len(network.stages) :]
        return {level["module"]: level["num_chs"] for level in levels}
    return dict(MOBILENET_LEVELS)


def _levels(name: str, network: nn.Module, small: bool) -> dict[str, int]:
    """Return the stages under the pyramid: RetinaNet leaves out the finest, a small R-CNN the coarsest."""
    stages = list(stages_of(network).items())
    if name == "retinanet":
        return dict(stages[1:])
    return dict(stages[:3] if small else stages)


# the detectors


class _RetinaNet(RetinaNet):
    """RetinaNet with labels that count from 1, as in the other detectors; its own has no background class."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
            if any(bool((target["labels"] < 0).any()) for target in targets):
                raise ConfigError("labels count from 1; a target has label 0 or less")
        found: Any = super().forward(images, targets)
        return found if self.training else [{**each, "labels": each["labels"] + 1} for each in found]


def _rcnn(name: str, pyramid: Pyramid, num_classes: int, small: bool, shape: dict[str, Any]) -> nn.Module:
    width, count = pyramid.out_channels, len(pyramid.fpn.inner_blocks)
    first, hidden = (16, 256) if small else (32, 1024)
    small_head = FastRCNNConvFCHead((width, 7, 7), [width], [hidden], SMALL_NORM)
    anchors = AnchorGenerator(tuple((first << level,) for level in range(count + 1)), ((0.5, 1.0, 2.0),) * (count + 1))
    parts: dict[str, Any] = {
        **shape,
        **(SMALL_PROPOSALS if small else {}),
        "rpn_anchor_generator": anchors,
        "box_roi_pool": _pool(count, 7, small),
        "box_head": small_head if small else TwoMLPHead(width * 49, hidden),
        "box_predictor": FastRCNNPredictor(hidden, num_classes + 1),
    }
    if name == "faster_rcnn":
        return FasterRCNN(pyramid, **parts)
    narrow = 32 if small else width
    layers = (narrow,) * (2 if small else 4)
    return MaskRCNN(
        pyramid,
        mask_roi_pool=_pool(count, 14, small),
        mask_head=MaskRCNNHeads(width, layers, 1, SMALL_NORM if small else None),
        mask_predictor=MaskRCNNPredictor(narrow, narrow, num_classes + 1),
        **parts,
    )


def _pool(count: int, size: int, small: bool) -> MultiScaleRoIAlign:
    """Return a pool of regions over ``count`` levels; the finest is for boxes below 112 px, or 32 if small."""
    names = [str(level) for level in range(count)]
    return MultiScaleRoIAlign(names, size, 1 if small else 2, canonical_scale=64 if small else 224)


def _retinanet(name: str, pyramid: Pyramid, num_classes: int, small: bool, shape: dict[str, Any]) -> nn.Module:
    first = 20 if small else 32
    sizes = tuple(
        tuple(int((first << level) * 2 ** (third / 3)) for third in range(3))
        for level in range(len(pyramid.fpn.inner_blocks) + 2)
    )
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    if not small:
        return _RetinaNet(pyramid, num_classes, anchor_generator=anchors, **shape)
    head = RetinaNetHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes, SMALL_NORM)
    for part in (head.classification_head, head.regression_head):
        part.conv = part.conv[:2]
    fewer = {"topk_candidates": 100, "detections_per_img": 20}
    return _RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, **shape, **fewer)
