"""The task of image classification."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2  # pyright: ignore[reportMissingTypeStubs]

from ecanet import networks
from ecanet.data import ClassificationData, DataSpec, has_boxes
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import Recipe
from ecanet.report import Artifacts, Example
from ecanet.training.graphs import TrainingGraph
from ecanet.training.tasks.base import NO_READABLE_IMAGE, Task, get_data
from ecanet.training.tasks.counts import ClassCounts, ExampleImages
from ecanet.training.tasks.losses import balance_classes, compute_loss
from ecanet.training.tasks.means import RunningMeans

__all__ = ["Classification"]

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
        self.graph = TrainingGraph(self.model) if recipe.cuda_graph else None
        self.channels = spec.channels if networks.is_ours(config.name) else 3
        mixes: list[v2.Transform] = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
        mixes += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.counts = ClassCounts(classes)
        self.class_weights: Tensor | None = None
        self.held_out = RunningMeans()
        self.confusion: list[list[int]] = []
        self.example_images = ExampleImages()
        self.examples: list[Example] = []
        self.images_evaluated = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of normalized images ``x`` (N, C, H, W).

        Other libraries' networks take three channels: for them a grey image is repeated.
        """
        x = x.expand(-1, self.channels, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else x
        return self.model(x) if self.graph is None else self.graph(x)

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
        """Forget the last evaluation."""
        self.counts.reset()
        self.held_out.reset()
        self.example_images = ExampleImages()
        self.images_evaluated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics, and collect examples, without waiting for a GPU."""
        images, labels = batch
        if not len(images):
            return
        if self.images_evaluated == 0:
            self.sample = images[:SAMPLE].clone()
        self.images_evaluated += len(images)
        logits = cast(Tensor, self(images)).float()
        self.counts.update(logits, labels)
        self.held_out.add({"val_loss": F.cross_entropy(logits, labels)}, len(images))
        self.example_images.add(images, labels, logits)

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics over all processes, and log them.

        Raises:
            DataError: no process could read an image.
        """
        count = torch.tensor(self.images_evaluated, device=self.device)
        if not int(cast(Tensor, self.all_gather(count)).sum()):  # pyright: ignore[reportUnknownMemberType]
            raise DataError(NO_READABLE_IMAGE)
        super().on_validation_epoch_end()
        counts = {**self.counts.compute()}
        self.confusion = cast(list[list[int]], counts.pop("confusion").tolist())  # pyright: ignore[reportUnknownMemberType]
        for name, value in {**self.held_out.compute(), **counts}.items():
            self.log(name, value)
        self.examples = self.example_images.to_list(self.spec)

    def artifacts(self) -> Artifacts:
        """Return class names, the confusion matrix (a row per true class), and correct and wrong examples."""
        return {
            "class_names": list(self.spec.class_names),
            "confusion": self.confusion,
            "examples": self.examples,
        }
