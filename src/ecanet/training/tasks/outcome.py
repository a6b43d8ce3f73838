"""What the detection task is made of: the detector of a recipe, and the scoring of what it finds, with pycocotools."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from ecanet.data import Annotations, DataSpec, encode_mask, has_boxes
from ecanet.errors import ConfigError
from ecanet.models import create_detector
from ecanet.recipes import Recipe
from ecanet.report import Artifacts, DetectionExample

__all__ = ["METRICS", "Outcome", "average_precision", "detector"]

METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL")

EXAMPLES = 6
SURE = 0.5
"""Objects with at least this score are shown, and counted in right and wrong examples."""


def detector(recipe: Recipe, spec: DataSpec) -> nn.Module:
    """The network of a detection ``recipe`` for data of this ``spec``.

    Raises:
        ConfigError: no such detector or backbone, or settings that do not fit them.
        CheckpointError: its weights cannot be used.
    """
    if not has_boxes(recipe.data.name):
        raise ConfigError(f"detection needs annotated images, coco:PATH or scenes, got {recipe.data.name!r}")
    model, settings = recipe.model, recipe.detector
    return create_detector(
        model.name,
        settings.backbone,
        num_classes=len(spec.class_names),
        attention=model.attention,
        kernel_sizes=model.kernel_sizes,
        weights=model.weights,
        norm=settings.norm,
        frozen_stages=settings.frozen_stages,
        freeze_attention=settings.freeze_attention,
        small=settings.small,
        short_side=spec.size,
        scales=settings.scales,
        mean=spec.mean,
        std=spec.std,
        **model.options,
    )


class Outcome:
    """What a detector found on annotated images: COCO's result entries, their scores, and a few examples."""

    def __init__(self, annotations: Annotations):
        self.annotations = annotations
        self.seen: list[int] = []
        self.results: dict[str, list[dict[str, Any]]] = {"bbox": []}
        self.examples: list[DetectionExample] = []
        self.curves: dict[str, list[float]] = {}

    def add(self, images: list[Tensor], targets: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> None:
        """Note what was ``found`` on ``images`` (3, H, W) from 0 to 1, where ``targets`` say what there is."""
        for image, target, each in zip(images, targets, found, strict=True):
            each = {name: value.float().cpu() if name == "masks" else value.cpu() for name, value in each.items()}
            self.seen.append(int(target["image_id"]))
            self._note(self.seen[-1], each)
            self._keep_example(image, {name: value.cpu() for name, value in target.items()}, each)

    def gather(self) -> None:
        """Bring together what all processes noted; each goes on with all of it."""
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.seen, self.results))
        kinds = sorted({kind for _, part in parts for kind in part})
        self.seen = [image for seen, _ in parts for image in seen]
        self.results = {kind: [entry for _, part in parts for entry in part.get(kind, [])] for kind in kinds}

    def score(self) -> dict[str, float]:
        """COCO's six figures for boxes and, where there are masks, for masks with ``mask_`` before their names.

        Of the images that were seen: those that cannot be read count as little as those that are missing.
        """
        truth = self.annotations.to_coco()
        figures: dict[str, float] = {}
        for kind, results in self.results.items():
            prefix = "mask_" if kind == "segm" else ""
            scored, curve = average_precision(truth, results, kind, self.seen)
            figures |= {prefix + name: value for name, value in scored.items()}
            self.curves["masks" if kind == "segm" else "boxes"] = curve
        return figures

    def artifacts(self) -> Artifacts:
        """What the report draws."""
        return {"precision_recall": self.curves, "detections": self.examples}

    def _note(self, image: int, found: dict[str, Tensor]) -> None:
        corners, scores = found["boxes"].double(), found["scores"].tolist()
        sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        heads = [
            {"image_id": image, "category_id": self.annotations.category_ids[label - 1], "score": score}
            for label, score in zip(found["labels"].tolist(), scores, strict=True)
        ]
        self.results["bbox"] += [{**head, "bbox": box} for head, box in zip(heads, sides, strict=True)]
        if "masks" not in found:
            return
        masks = (found["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        entries = self.results.setdefault("segm", [])
        entries += [{**head, "segmentation": encode_mask(mask)} for head, mask in zip(heads, masks, strict=True)]

    def _keep_example(self, image: Tensor, target: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """The first few images on which all is told rightly, and the first few on which something is not."""
        right = all_found(target, found)
        if sum(example["right"] == right for example in self.examples) < EXAMPLES:
            sure = found["scores"] >= SURE
            self.examples.append(
                {
                    "image": (image * 255).round().to(torch.uint8).cpu(),
                    "right": right,
                    "found": {name: value[sure] for name, value in found.items()},
                    "truth": {name: target[name] for name in ("boxes", "labels")},
                }
            )


def all_found(target: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    """Whether the sure ones of ``found`` are the objects of ``target``, one for one: label, and half of the area."""
    sure = found["scores"] >= SURE
    if int(sure.sum()) != len(target["labels"]):
        return False
    overlap = box_iou(target["boxes"], found["boxes"][sure]) * (target["labels"][:, None] == found["labels"][sure])
    return not len(overlap) or bool((overlap.amax(0) >= 0.5).all() and (overlap.amax(1) >= 0.5).all())


def average_precision(
    truth: Any, results: list[dict[str, Any]], kind: Any, images: Sequence[int]
) -> tuple[dict[str, float], list[float]]:
    """COCO's six figures for ``results`` (entries of a result file) against ``truth`` (a ``pycocotools`` COCO).

    ``kind`` is "bbox" or "segm", ``images`` has the ids of those that count. The second value is precision at recall 0,
    0.01, …, 1 with an overlap of a half, mean over the classes. Figures are from 0 to 1, and -1 where there is nothing
    to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(None):
        if results:
            # loadRes writes into the entries it is given
            found = truth.loadRes([dict(entry) for entry in results])
        else:
            found: Any = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scoring = COCOeval(truth, found, kind)
        scoring.params.imgIds = sorted(set(images))
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    # overlap, recall, class, size, detections: an overlap of 0.5, all sizes, 100 detections
    precision = scoring.eval["precision"][0, :, :, 0, 2]
    there = precision[:, (precision >= 0).all(0)]
    curve = there.mean(1).tolist() if there.size else []
    return dict(zip(METRICS, map(float, scoring.stats[:6]), strict=True)), curve
