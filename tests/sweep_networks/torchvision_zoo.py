"""torchvision's networks: classifiers, detectors, segmentation, video, optical flow, quantizable ones."""

from functools import partial
from typing import Any

from torch import nn

from sweep_networks.inputs import Builder, Network, pair_with_image, strengthen
from tensors import noise

CLASSIFIERS = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
squeezenet1_1 vgg11_bn wide_resnet50_2 swin_t"""


def build_classifier(name: str) -> Network:
    """Return the classifier ``name``."""
    from torchvision.models import get_model

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return pair_with_image(get_model(name, **options))


def build_quantizable(name: str) -> Network:
    """Return the classifier ``name`` in the form that eager quantization takes, not yet quantized."""
    from torchvision.models import quantization

    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return pair_with_image(getattr(quantization, name)(weights=None, quantize=False, **options))


def build_faster_rcnn() -> Network:
    """Return Faster R-CNN with frozen batch norms, and two images of different sizes."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=96, box_score_thresh=0.0)
    return model, ([noise(3, 64, 64), noise(3, 64, 80)],)


def build_detector(name: str, **options: Any) -> Network:
    """Return the detector ``name``, and one image in a list."""
    from torchvision.models import detection

    model: nn.Module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **options)
    return strengthen(model) if name.startswith("ssdlite") else model, ([noise(3, 64, 64)],)


def build_segmentation(name: str) -> Network:
    """Return the segmentation network ``name``, which returns a dictionary."""
    from torchvision.models import segmentation

    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)
    return model, (noise(2, 3, 64, 64),)


def build_video(name: str, frames: int = 8, size: int = 64) -> Network:
    """Return the video network ``name``, and two clips."""
    from torchvision.models import video

    return getattr(video, name)(weights=None), (noise(2, 3, frames, size, size),)


def build_flow(name: str) -> Network:
    """Return RAFT with two refinements, and two pairs of frames."""
    from torchvision.models import optical_flow

    model = getattr(optical_flow, name)(weights=None)
    return Refined(model), (noise(2, 3, 128, 128), noise(2, 3, 128, 128).flip(3))


class Refined(nn.Module):
    """Run RAFT with two refinements: its default of 12 takes too long here."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *frames: object) -> object:
        return self.model(*frames, num_flow_updates=2)


SMALL = {"min_size": 64, "max_size": 64}
ALL_BOXES = {"score_thresh": 0.0, "nms_thresh": 1.0, "topk_candidates": 10000, "detections_per_img": 10000}
"""Options of SSD, which otherwise keeps the best boxes and so hides what gates do to the others."""

NETWORKS: dict[str, Builder] = {
    **{name: partial(build_classifier, name) for name in CLASSIFIERS.split()},
    "faster_rcnn": build_faster_rcnn,
    "retinanet": partial(build_detector, "retinanet_resnet50_fpn", score_thresh=0.0, **SMALL),
    "deeplabv3": partial(build_segmentation, "deeplabv3_resnet50"),
    "fasterrcnn_mobilenet_v3": partial(
        build_detector, "fasterrcnn_mobilenet_v3_large_320_fpn", box_score_thresh=0.0, **SMALL
    ),
    "fcos": partial(build_detector, "fcos_resnet50_fpn", score_thresh=0.0, **SMALL),
    "maskrcnn": partial(
        build_detector, "maskrcnn_resnet50_fpn", box_score_thresh=0.0, box_detections_per_img=3, **SMALL
    ),
    "keypointrcnn": partial(
        build_detector, "keypointrcnn_resnet50_fpn", box_score_thresh=0.0, box_detections_per_img=3, **SMALL
    ),
    "ssd300_vgg16": partial(build_detector, "ssd300_vgg16", **ALL_BOXES),
    "ssdlite320_mobilenet_v3": partial(build_detector, "ssdlite320_mobilenet_v3_large", **ALL_BOXES),
    "fcn_resnet50": partial(build_segmentation, "fcn_resnet50"),
    "lraspp_mobilenet_v3": partial(build_segmentation, "lraspp_mobilenet_v3_large"),
    "deeplabv3_mobilenet_v3": partial(build_segmentation, "deeplabv3_mobilenet_v3_large"),
    **{name: partial(build_video, name) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
    "s3d": partial(build_video, "s3d", 16, 224),
    "raft_small": partial(build_flow, "raft_small"),
    "raft_large": partial(build_flow, "raft_large"),
    **{
        f"quantizable-{name}": partial(build_quantizable, name)
        for name in (
            "resnet18",
            "mobilenet_v2",
            "mobilenet_v3_large",
            "shufflenet_v2_x0_5",
            "googlenet",
            "inception_v3",
        )
    },
}

EVALUATED_ONLY = (
    *("faster_rcnn", "retinanet", "fasterrcnn_mobilenet_v3", "fcos", "maskrcnn", "keypointrcnn", "ssd300_vgg16"),
    "ssdlite320_mobilenet_v3",
)
"""Their training needs boxes; the gradients of their backbones are those of the classifiers."""
