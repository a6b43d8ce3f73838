"""The task of image classification."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassStatScores
from torchvision.transforms import v2  # pyright: ignore[reportMissingTypeStubs]

from ecanet import networks
from ecanet.data import ClassificationData, DataSpec, has_boxes
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import Recipe
from ecanet.report import Artifacts, Example
from ecanet.training.tasks.base import NO_READABLE_IMAGE, Task, get_data
from ecanet.training.tasks.losses import balance_classes, compute_loss

__all__ = ["Classification"]

# A confusion matrix grows with the square of the number of classes.
MOST_CLASSES_COMPARED = 1000
EXAMPLES = 12
"""Number of correctly classified images in the report, and of wrongly classified ones."""
SAMPLE = 64
"""Number of images on which the report shows the gates."""

Batch = tuple[Tensor, Tensor]
"""Normalized images (N, C, H, W) and labels (N,)."""


class Classification(Task):
    """One class per image: cross-entropy or BCE; accuracies in percent on the held-out images.

    ``top1`` always; ``top5`` of more than five classes; ``macro``, the mean of the classes' accuracies, where some
    classes have more held-out images than others.
    """

    monitor = "top1"

    def __init__(self, recipe: Recipe, spec: DataSpec):
        if has_boxes(recipe.data.name):
            raise ConfigError(f"{recipe.data.name} has boxes and no classes of images: set task=detection")
        classes, config = len(spec.class_names), recipe.model
        if isinstance(recipe.class_weights, tuple) and len(recipe.class_weights) != classes:
            raise ConfigError(
                f"class_weights has {len(recipe.class_weights)} numbers and {recipe.data.name} {classes} classes; "
                "give one number for each, in the order of the class names"
            )
        built = networks.build(config, num_classes=classes, image=(spec.channels, spec.size, spec.size))
        super().__init__(recipe, spec, built.model)
        self.keep_story(built)
        self.channels = spec.channels if networks.is_ours(config.name) else 3
        mixes: list[v2.Transform] = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
        mixes += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.top1 = MulticlassAccuracy(classes, average="micro")
        # Of five classes or fewer, every image is among the first five.
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=5) if classes > 5 else None
        self.class_counts = MulticlassStatScores(classes, average=None)
        self.class_weights: Tensor | None = None
        self.held_out_loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(classes) if classes <= MOST_CLASSES_COMPARED else None
        self.confusion_counts: list[list[int]] = []
        self.examples: list[Example] = []
        self.images_evaluated = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of normalized images ``x`` (N, C, H, W).

        Other libraries' networks take three channels: for them a grey image is repeated.
        """
        x = x.expand(-1, self.channels, -1, -1)
        return self.model(x.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else x)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of ``logits`` (N, K); ``labels`` are class indices (N,) or probabilities (N, K)."""
        recipe = self.recipe
        return compute_loss(
            logits, labels, name=recipe.loss, smoothing=recipe.label_smoothing, weights=self.class_weights
        )

    def on_fit_start(self) -> None:
        """Compute the class weights, which may depend on the training images."""
        if self.recipe.class_weights == "balanced":
            data = get_data(self.trainer)
            assert isinstance(data, ClassificationData)
            assert data.train is not None
            self.class_weights = balance_classes(data.train.get_labels(), len(self.spec.class_names)).to(self.device)
        elif self.recipe.class_weights is not None:
            self.class_weights = torch.tensor(self.recipe.class_weights, device=self.device)

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of a batch after mixup or cutmix, if the recipe has them."""
        images, labels = batch if self.mix is None else cast(Batch, self.mix(*batch))
        return {"train_loss": self.loss(self(images), labels)}

    def on_validation_epoch_start(self) -> None:
        """Remove the examples of the last evaluation."""
        self.examples = []
        self.images_evaluated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics, and collect examples."""
        images, labels = batch
        if not len(images):
            return
        if self.images_evaluated == 0:
            self.sample = images[:SAMPLE].clone()
        self.images_evaluated += len(images)
        logits = cast(Tensor, self(images)).float()
        self.top1.update(logits, labels)
        if self.top5 is not None:
            self.top5.update(logits, labels)
        self.class_counts.update(logits, labels)
        if self.confusion is not None:
            self.confusion.update(logits, labels)
        self.held_out_loss.update(F.cross_entropy(logits, labels), len(images))
        self._collect_examples(images, labels, logits)

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics over all processes, and log them.

        Raises:
            DataError: no process could read an image.
        """
        count = torch.tensor(self.images_evaluated, device=self.device)
        if not int(cast(Tensor, self.all_gather(count)).sum()):  # pyright: ignore[reportUnknownMemberType]
            raise DataError(NO_READABLE_IMAGE)
        super().on_validation_epoch_end()
        self.log("val_loss", self.held_out_loss.compute())
        self.held_out_loss.reset()
        self.log("top1", 100 * self.top1.compute())
        self.top1.reset()
        if self.top5 is not None:
            self.log("top5", 100 * self.top5.compute())
            self.top5.reset()
        self._log_macro()
        if self.confusion is not None:
            counts = self.confusion.compute()
            self.confusion_counts = cast(list[list[int]], counts.tolist())  # pyright: ignore[reportUnknownMemberType]
            self.confusion.reset()

    def _log_macro(self) -> None:
        """Log the mean of the classes' accuracies, where it differs from top-1: some classes have more images."""
        counts = self.class_counts.compute()  # (K, 5): the first is the number of true positives, the last of images
        self.class_counts.reset()
        correct, images = (counts[counts[:, 4] > 0, column].float() for column in (0, 4))
        if images.min() < images.max():
            self.log("macro", 100 * (correct / images).mean())

    def artifacts(self) -> Artifacts:
        """Return class names, the confusion matrix (a row per true class), and correct and wrong examples."""
        return {
            "class_names": list(self.spec.class_names),
            "confusion": self.confusion_counts,
            "examples": self.examples,
        }

    def _collect_examples(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep the first few correctly classified images, and the first few wrongly classified ones."""
        predictions = logits.argmax(1)
        for correct in (True, False):
            kept = sum((e["label"] == e["prediction"]) == correct for e in self.examples)
            if kept == EXAMPLES:
                continue
            indices = ((predictions == labels) == correct).nonzero().flatten()
            for index in map(int, indices[: EXAMPLES - kept]):
                self.examples.append(
                    {
                        "image": self.spec.denormalize(images[index]).cpu(),
                        "label": int(labels[index]),
                        "prediction": int(predictions[index]),
                        "probability": float(logits[index].softmax(0)[predictions[index]]),
                    }
                )
