"""The task of image classification."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2

from ecanet import models
from ecanet.data import DataSpec, has_boxes
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import Recipe
from ecanet.report import Artifacts, Example
from ecanet.training.tasks.base import NOTHING_READ, Task

__all__ = ["Classification"]

# a confusion matrix grows with the square of the classes
MOST_CLASSES_COMPARED = 1000
EXAMPLES = 12


class Classification(Task):
    """One class for each image: cross-entropy or BCE; top-1 and top-5 in percent on the held-out images."""

    monitor = "top1"

    def __init__(self, recipe: Recipe, spec: DataSpec):
        if has_boxes(recipe.data.name):
            raise ConfigError(f"{recipe.data.name} has boxes and no classes of images: set task=detection")
        classes, config = len(spec.class_names), recipe.model
        model = models.create_model(
            config.name,
            attention=config.attention,
            kernel_sizes=config.kernel_sizes,
            num_classes=classes,
            in_channels=spec.channels,
            weights=config.weights,
            **config.options,
        )
        super().__init__(recipe, spec, model)
        mixes: list[v2.Transform] = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
        mixes += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
        self.held_out_loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(classes) if classes <= MOST_CLASSES_COMPARED else None
        self.confused: list[list[int]] = []
        self.examples: list[Example] = []

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of ``logits`` (N, K) for ``labels``: numbers (N,), or shares of each class (N, K)."""
        smoothing = self.recipe.label_smoothing
        if self.recipe.loss == "cross-entropy":
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        classes = logits.shape[1]
        shares = F.one_hot(labels, classes).to(logits.dtype) if labels.ndim == 1 else labels.to(logits.dtype)
        shares = shares * (1 - smoothing) + smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(logits)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Loss of one batch, mixed if the recipe says so; none for a batch of unreadable images."""
        if not len(batch[0]):
            return self.nothing()
        images, labels = batch if self.mix is None else self.mix(*batch)
        loss = self.loss(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation's examples."""
        self.examples = []
        self.seen = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count what is right, and keep a few examples of both kinds."""
        images, labels = batch
        if not len(images):
            return
        self.seen += len(images)
        logits = self(images).float()
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        if self.confusion is not None:
            self.confusion.update(logits, labels)
        self.held_out_loss.update(F.cross_entropy(logits, labels), len(images))
        self._keep_examples(images, labels, logits)

    def on_validation_epoch_end(self) -> None:
        """Gather the counts of all processes, while they are all here."""
        if not int(cast(Tensor, self.all_gather(torch.tensor(self.seen, device=self.device))).sum()):
            raise DataError(NOTHING_READ)
        self.log("val_loss", self.held_out_loss.compute())
        self.held_out_loss.reset()
        for name, metric in (("top1", self.top1), ("top5", self.top5)):
            self.log(name, 100 * metric.compute())
            metric.reset()
        if self.confusion is not None:
            self.confused = self.confusion.compute().tolist()
            self.confusion.reset()

    def artifacts(self) -> Artifacts:
        """Class names, the confusion matrix (rows are the truth), and examples, right and wrong."""
        return {"class_names": list(self.spec.class_names), "confusion": self.confused, "examples": self.examples}

    def _keep_examples(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """The first few images that are told rightly, and the first few that are not."""
        predictions = logits.argmax(1)
        for right in (True, False):
            kept = sum((e["label"] == e["prediction"]) == right for e in self.examples)
            if kept == EXAMPLES:
                continue
            for at in ((predictions == labels) == right).nonzero().flatten().tolist()[: EXAMPLES - kept]:
                self.examples.append(
                    {
                        "image": self.spec.denormalize(images[at]).cpu(),
                        "label": int(labels[at]),
                        "prediction": int(predictions[at]),
                        "probability": float(logits[at].softmax(0)[predictions[at]]),
                    }
                )
