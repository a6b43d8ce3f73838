"""What an evaluation of a classifier collects, batch by batch, without waiting for a GPU: counts and example images."""

from typing import cast

import torch
from torch import Tensor
from torchmetrics import Metric

from ecanet.data import DataSpec
from ecanet.report import Example

__all__ = ["ClassCounts", "ExampleImages"]

# A confusion matrix grows with the square of the number of classes.
MOST_CLASSES_COMPARED = 1000
EXAMPLES = 12
"""Number of correctly classified images in the report, and of wrongly classified ones."""


class ClassCounts(Metric):
    """Counts of images, over all processes: of each class, correctly classified ones, and a confusion matrix.

    torchmetrics' own counts use `torch.bincount`, for which the program waits for the GPU in each batch.
    """

    images: Tensor
    """Images of each class (K,)."""
    correct: Tensor
    """Correctly classified images of each class (K,)."""
    among_five: Tensor
    """Number of images whose class is among the five most probable ones."""
    confusion: Tensor
    """Images by class and predicted class (K, K); empty of more than 1,000 classes."""

    def __init__(self, classes: int):
        super().__init__()
        compared = classes if classes <= MOST_CLASSES_COMPARED else 0
        for name, shape in (
            ("images", (classes,)),
            ("correct", (classes,)),
            ("among_five", ()),
            ("confusion", (compared, compared)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.long), "sum")  # pyright: ignore[reportUnknownMemberType]

    def update(self, logits: Tensor, labels: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count a batch of ``logits`` (N, K) and ``labels`` (N,)."""
        predictions, one = logits.argmax(1), torch.ones_like(labels)
        self.images.index_add_(0, labels, one)
        self.correct.index_add_(0, labels, (predictions == labels).long())
        if logits.shape[1] > 5:  # of five classes or fewer, every image is among the first five
            self.among_five += (logits.topk(5).indices == labels[:, None]).sum()
        if self.confusion.numel():
            self.confusion.view(-1).index_add_(0, labels * logits.shape[1] + predictions, one)

    def compute(self) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return ``confusion``, and in percent ``top1``, ``top5`` of more than five classes, and perhaps ``macro``.

        ``macro`` is the mean of the classes' accuracies. It is there where some classes have more images than others,
        because it differs from top-1 only there.
        """
        total = self.images.sum()
        found: dict[str, Tensor] = {"top1": 100 * (self.correct.sum() / total)}
        if len(self.images) > 5:
            found["top5"] = 100 * (self.among_five / total)
        correct, images = (x[self.images > 0].float() for x in (self.correct, self.images))
        if images.min() < images.max():
            found["macro"] = 100 * (correct / images).mean()
        return {"confusion": self.confusion, **found}


class ExampleImages:
    """The first few correctly classified images of an evaluation, and the first few wrongly classified ones.

    How many a batch has would be known only after waiting for the GPU. So a fixed number of images is kept, with a
    flag that says which of them count; `to_list` waits once.
    """

    def __init__(self) -> None:
        self.kept: dict[bool, tuple[Tensor, ...]] = {}

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Add normalized ``images`` (N, C, H, W) with ``labels`` (N,) and ``logits`` (N, K)."""
        probabilities, predictions = logits.softmax(1).max(1)
        for correct in (True, False):
            fits = (predictions == labels) == correct
            batch = _take_first(fits, images, labels, predictions, probabilities)
            if correct in self.kept:
                batch = _take_first(*(torch.cat(pair) for pair in zip(self.kept[correct], batch, strict=True)))
            self.kept[correct] = batch

    def to_list(self, spec: DataSpec) -> list[Example]:
        """Return the examples, correct ones first."""
        found: list[Example] = []
        for rows in self.kept.values():
            fits, images, labels, predictions, probabilities = (x.cpu() for x in rows)
            indices = cast(list[int], fits.nonzero()[:, 0].tolist())  # pyright: ignore[reportUnknownMemberType]
            found += [
                Example(
                    image=spec.denormalize(images[index]),
                    label=int(labels[index]),
                    prediction=int(predictions[index]),
                    probability=float(probabilities[index]),
                )
                for index in indices
            ]
        return found


def _take_first(fits: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Return ``fits`` and ``rows`` of at most `EXAMPLES` images: first those that fit, in their order."""
    first = torch.sort(fits, descending=True, stable=True).indices[:EXAMPLES]
    return fits[first], *(x[first] for x in rows)
