"""The task of object detection and instance segmentation."""

import json
from typing import Any, cast

import torch
from torch import Tensor

from ecanet.data import DataSpec
from ecanet.errors import DataError
from ecanet.recipes import Recipe
from ecanet.report import Artifacts
from ecanet.training.tasks.base import NOTHING_READ, Task
from ecanet.training.tasks.outcome import Outcome, detector

__all__ = ["Detection"]


class Detection(Task):
    """Boxes, and masks with Mask R-CNN, around objects; COCO's average precision, from 0 to 1, on the held-out images.

    ``AP``, ``AP50``, ``AP75``, ``APS``, ``APM`` and ``APL`` are the boxes', ``mask_AP`` and so on the masks'; -1 stands
    where no held-out object has the size.
    """

    monitor = "AP"

    def __init__(self, recipe: Recipe, spec: DataSpec):
        super().__init__(recipe, spec, detector(recipe, spec))
        self.outcome: Outcome | None = None

    def forward(self, x: list[Tensor], targets: Any = None) -> Any:
        """Losses by name while training, else what is found on each of the images ``x`` (3, H, W) from 0 to 1."""
        return self.model(x, targets)

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor | None:
        """The sum of the detector's losses; none for a batch of unreadable images."""
        images, targets = batch
        if not images:
            return self.nothing()
        losses = self(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict(
            {"train_loss": loss, **{f"{name.removeprefix('loss_')}_loss": value for name, value in losses.items()}},
            on_step=False,
            on_epoch=True,
            batch_size=len(images),
            sync_dist=True,
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.outcome = Outcome(cast(Any, self.trainer).datamodule.held_out.annotations)

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        """Note what is found, and keep a few examples, right and wrong."""
        assert self.outcome is not None
        if batch[0]:
            self.outcome.add(*batch, self(batch[0]))

    def on_validation_epoch_end(self) -> None:
        """Score what all processes found together."""
        assert self.outcome is not None
        if self.trainer.world_size > 1:
            self.outcome.gather()
        if not self.outcome.seen:
            raise DataError(NOTHING_READ)
        self.log_dict(self.outcome.score(), batch_size=1)

    def artifacts(self) -> Artifacts:
        """Class names, precision by recall, and examples, right and wrong."""
        found: Artifacts = self.outcome.artifacts() if self.outcome else {}
        return {"class_names": list(self.spec.class_names), **found}

    def files(self) -> dict[str, str]:
        """What was found on the held-out images as COCO's result files, ``bbox.json`` and ``segm.json``."""
        results = self.outcome.results if self.outcome else {}
        return {f"{kind}.json": json.dumps(entries) for kind, entries in results.items()}
