"""The task of object detection and instance segmentation."""

import json
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ecanet.data import DataSpec, DetectionData, Target
from ecanet.errors import DataError
from ecanet.recipes import Recipe
from ecanet.report import Artifacts
from ecanet.training.detectors import build_detector
from ecanet.training.tasks.base import NO_READABLE_IMAGE, Task, get_data
from ecanet.training.tasks.outcome import Outcome

__all__ = ["Detection"]

SAMPLE = 8
"""Number of images on which the report shows the gates."""

Batch = tuple[list[Tensor], list[Target]]
"""Images (3, H, W) from 0 to 1, and a target for each."""


class Detection(Task):
    """Boxes around objects, and masks with Mask R-CNN; COCO's average precision (0 to 1) on the held-out images.

    ``AP``, ``AP50``, ``AP75``, ``APS``, ``APM`` and ``APL`` are for boxes, ``mask_AP`` and so on for masks. A metric is
    -1 if no held-out object has the size.
    """

    monitor = "AP"

    def __init__(self, recipe: Recipe, spec: DataSpec):
        built = build_detector(recipe, spec)
        super().__init__(recipe, spec, built.model)
        self.keep_story(built)
        self.outcome: Outcome | None = None

    def forward(
        self, x: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses by name in training mode, else the detections on each image of ``x`` (3, H, W), 0 to 1.

        torchvision's RetinaNet and FCOS have an output for the label 0, which means nothing: it is left out.
        """
        found = self.model(x, targets)
        if isinstance(found, dict):
            return cast(dict[str, Tensor], found)
        detections = cast(list[dict[str, Tensor]], found)
        return [{name: value[one["labels"] > 0] for name, value in one.items()} for one in detections]

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the detector's losses, and each of them."""
        losses = cast(dict[str, Tensor], self(*batch))
        each = {f"{name.removeprefix('loss_')}_loss": value for name, value in losses.items()}
        return {"train_loss": torch.stack(list(losses.values())).sum(), **each}

    def on_validation_epoch_start(self) -> None:
        """Replace the results of the last evaluation by empty ones."""
        data = get_data(self.trainer)
        assert isinstance(data, DetectionData)
        self.outcome = Outcome(data.held_out.annotations)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the detections on a batch."""
        assert self.outcome is not None
        images, targets = batch
        if images:
            self.sample = self.sample or images[:SAMPLE]
            self.outcome.add(images, targets, cast(list[dict[str, Tensor]], self(images)))

    def on_validation_epoch_end(self) -> None:
        """Score the detections of all processes, and log the metrics.

        Raises:
            DataError: no process could read an image.
        """
        assert self.outcome is not None
        if self.trainer.world_size > 1:
            self.outcome.gather()
        if not self.outcome.image_ids:
            raise DataError(NO_READABLE_IMAGE)
        super().on_validation_epoch_end()
        self.log_dict(self.outcome.score(), batch_size=1)

    def artifacts(self) -> Artifacts:
        """Return class names, precision by recall, and correct and wrong examples."""
        class_names = list(self.spec.class_names)
        if self.outcome is None:
            return {"class_names": class_names}
        return {
            "class_names": class_names,
            "precision_recall": self.outcome.curves,
            "detections": self.outcome.examples,
        }

    def files(self) -> dict[str, str]:
        """Return the detections on the held-out images as COCO's result files, ``bbox.json`` and ``segm.json``."""
        results = self.outcome.results if self.outcome else {}
        return {f"{kind}.json": json.dumps(entries) for kind, entries in results.items()}
