"""Ultralytics' networks from the YAML files inside its package."""

from functools import partial

from sweep_networks.inputs import Builder, Network
from tensors import noise

DETECTORS = """yolo11n yolov8n yolov5n yolov3-tiny yolov6n yolov8n-ghost yolov8n-p2 yolov9t yolov9s yolov10n yolo12n
yolo26n"""


def build(kind: str, name: str, size: int = 64) -> Network:
    """Return the network of the YAML file ``name``, built by Ultralytics' class ``kind``."""
    from ultralytics.nn import tasks

    return getattr(tasks, kind)(f"{name}.yaml", verbose=False), (noise(2, 3, size, size),)


NETWORKS: dict[str, Builder] = {
    **{name: partial(build, "DetectionModel", name) for name in DETECTORS.split()},
    "yolov8n-seg": partial(build, "SegmentationModel", "yolov8n-seg"),
    "yolo11n-seg": partial(build, "SegmentationModel", "yolo11n-seg"),
    "yolov8n-pose": partial(build, "PoseModel", "yolov8n-pose"),
    "yolo11n-obb": partial(build, "OBBModel", "yolo11n-obb"),
    "yolov8n-cls": partial(build, "ClassificationModel", "yolov8n-cls"),
    "yolo11n-cls": partial(build, "ClassificationModel", "yolo11n-cls"),
    "yolov8n-rtdetr": partial(build, "RTDETRDetectionModel", "yolov8n-rtdetr", 128),
    "rtdetr-resnet50": partial(build, "RTDETRDetectionModel", "rtdetr-resnet50", 64),
}
