"""The results of a detector, which pycocotools scores."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou  # pyright: ignore[reportMissingTypeStubs]

from ecanet.data import Annotations, RunLengths, Target, encode_mask
from ecanet.report import DetectionExample

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["METRICS", "Outcome", "compute_average_precision", "is_correct"]

METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL")

EXAMPLES = 6
"""Number of correct images in the report, and of wrong ones."""

MIN_SCORE = 0.5
"""Objects of at least this score are drawn, and decide whether an example is correct."""

Kind = Literal["bbox", "segm"]


class ResultEntry(TypedDict):
    """One detected object, as in COCO's result files; ``bbox`` is left, top, width and height in pixels."""

    image_id: int
    category_id: int
    score: float
    bbox: NotRequired[list[float]]
    segmentation: NotRequired[RunLengths]


class Outcome:
    """The detections on annotated images: COCO's result entries, their scores, and a few examples.

    ``results`` has the entries by kind, "bbox" and perhaps "segm"; ``image_ids`` has the images that were evaluated;
    ``curves`` has, after `score`, precision by recall.
    """

    def __init__(self, annotations: Annotations):
        self.annotations = annotations
        self.image_ids: list[int] = []
        self.results: dict[Kind, list[ResultEntry]] = {"bbox": []}
        self.examples: list[DetectionExample] = []
        self.curves: dict[str, list[float]] = {}

    def add(
        self, images: Sequence[Tensor], targets: Sequence[Target], detections: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add the ``detections`` on ``images`` (3, H, W) from 0 to 1, whose annotations are ``targets``."""
        for image, target, found in zip(images, targets, detections, strict=True):
            # Masks may be bfloat16, which NumPy does not have.
            on_cpu = {name: value.float().cpu() if name == "masks" else value.cpu() for name, value in found.items()}
            self.image_ids.append(int(target["image_id"]))
            self._add_results(self.image_ids[-1], on_cpu)
            self._add_example(image, {name: value.cpu() for name, value in target.items()}, on_cpu)

    def gather(self) -> None:
        """Collect the results of all processes, in every process."""
        parts: list[tuple[list[int], dict[Kind, list[ResultEntry]]]] = [([], {})] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.image_ids, self.results))
        self.image_ids = [image for image_ids, _ in parts for image in image_ids]
        gathered: dict[Kind, list[ResultEntry]] = {}
        for _, results in parts:
            for kind, entries in results.items():
                gathered.setdefault(kind, []).extend(entries)
        self.results = gathered

    def score(self) -> dict[str, float]:
        """Return COCO's six metrics for boxes and, if there are masks, for masks with the prefix ``mask_``.

        Only images that could be read count.
        """
        truth = self.annotations.to_coco()
        metrics: dict[str, float] = {}
        for kind, results in self.results.items():
            prefix, name = ("mask_", "masks") if kind == "segm" else ("", "boxes")
            values, self.curves[name] = compute_average_precision(truth, results, kind, self.image_ids)
            metrics |= {prefix + metric: value for metric, value in values.items()}
        return metrics

    def _add_results(self, image: int, found: Mapping[str, Tensor]) -> None:
        corners = found["boxes"].double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        heads: list[ResultEntry] = [
            {"image_id": image, "category_id": self.annotations.category_ids[int(label) - 1], "score": float(score)}
            for label, score in zip(found["labels"], found["scores"], strict=True)
        ]
        for head, box in zip(heads, boxes, strict=True):
            self.results["bbox"].append({**head, "bbox": [float(side) for side in box]})
        if "masks" not in found:
            return
        masks = (found["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        entries = self.results.setdefault("segm", [])
        for head, mask in zip(heads, masks, strict=True):
            entries.append({**head, "segmentation": encode_mask(mask)})

    def _add_example(self, image: Tensor, target: Target, found: Mapping[str, Tensor]) -> None:
        """Keep the first few images whose detections are correct, and the first few whose detections are not."""
        correct = is_correct(target, found)
        if sum(example["right"] == correct for example in self.examples) < EXAMPLES:
            certain = found["scores"] >= MIN_SCORE
            self.examples.append(
                {
                    "image": (image * 255).round().to(torch.uint8).cpu(),
                    "right": correct,
                    "found": {name: value[certain] for name, value in found.items()},
                    "truth": {name: target[name] for name in ("boxes", "labels")},
                }
            )


def is_correct(target: Target, found: Mapping[str, Tensor]) -> bool:
    """Return whether the detections of a sufficient score match the objects of ``target`` one to one.

    A match has the same label and an intersection over union of at least a half.
    """
    certain = found["scores"] >= MIN_SCORE
    if int(certain.sum()) != len(target["labels"]):
        return False
    same_label = target["labels"][:, None] == found["labels"][certain]
    overlap = box_iou(target["boxes"], found["boxes"][certain]) * same_label
    return not len(overlap) or bool((overlap.amax(0) >= 0.5).all() and (overlap.amax(1) >= 0.5).all())


def compute_average_precision(
    truth: "COCO", results: Sequence[ResultEntry], kind: Kind, image_ids: Sequence[int]
) -> tuple[dict[str, float], list[float]]:
    """Return COCO's six metrics for ``results`` against the annotations ``truth``, and the precision by recall.

    Only images of ``image_ids`` count. The second value is the precision at recall 0, 0.01, …, 1 for an overlap of a
    half, averaged over the classes. Metrics are from 0 to 1, and -1 if there is nothing to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(None):
        if results:
            # loadRes writes into the entries that it gets.
            found = truth.loadRes([dict(entry) for entry in results])  # pyright: ignore[reportArgumentType]
        else:
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scoring = COCOeval(truth, found, kind)
        scoring.params.imgIds = sorted(set(image_ids))
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    # The axes are overlap, recall, class, size, detections: here an overlap of 0.5, all sizes, 100 detections.
    precision = np.asarray(scoring.eval["precision"], dtype=np.float64)[0, :, :, 0, 2]
    scored_classes = precision[:, (precision >= 0).all(0)]
    curve: list[float] = scored_classes.mean(1).tolist() if scored_classes.size else []
    return dict(zip(METRICS, map(float, scoring.stats[:6]), strict=True)), curve
