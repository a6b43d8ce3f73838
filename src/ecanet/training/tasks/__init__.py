"""What a network learns: loss, metrics, optimiser and schedule, as LightningModules.

A task has ``monitor``, the name of the metric by which the best checkpoint is chosen (higher is better), and
``artifacts()``, plain data for the report.

Read downward: `outcome` (what a detector found, and its score).
"""

import json
import math
from dataclasses import asdict
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2

from ecanet import models
from ecanet.data import DataSpec, boxes, check_classes, derive_seed
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import Recipe, ScheduleConfig, suggestion, to_dict
from ecanet.training.tasks import outcome as tasks_detection

__all__ = ["TASKS", "Classification", "Detection", "Task", "build", "learning_rate_factor"]

# a confusion matrix grows with the square of the classes
MOST_CLASSES_COMPARED = 1000
EXAMPLES = 12
NOTHING_READ = "not one held-out image could be read, so there is nothing to evaluate on"


def build(recipe: Recipe, spec: Any) -> "Task":
    """The task that ``recipe`` names, with a new network for data of this ``spec`` (``ecanet.data.build(…).spec``).

    Raises:
        ConfigError: no such task or network, or settings that do not fit them.
    """
    if recipe.task not in TASKS:
        raise ConfigError(f"unknown task {recipe.task!r}; {suggestion(recipe.task, list(TASKS))}")
    return TASKS[recipe.task](recipe, spec)


class Task(L.LightningModule):
    """What every task shares: a network ``model``, its optimiser, its schedule, and the same luck in a resumed run."""

    monitor: ClassVar[str]

    def __init__(self, recipe: Recipe, spec: DataSpec, model: nn.Module):
        super().__init__()
        self.recipe, self.spec = recipe, spec
        self.model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
        if recipe.compile:
            # in place: the names of the parameters stay as they are; a detector's other parts are no single graph
            getattr(self.model, "backbone", self.model).compile()

    def nothing(self) -> Tensor | None:
        """The loss of a batch of which nothing could be read; other processes wait for the gradients of this one."""
        if self.trainer.world_size == 1:
            return None
        return torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum() * 0

    def artifacts(self) -> dict[str, Any]:
        """Plain data that the report draws; `ecanet.report` says which names it knows."""
        return {}

    def files(self) -> dict[str, str]:
        """What the last evaluation found, as the names and contents of files, where there is a format for it."""
        return {}

    def forward(self, x: Any) -> Any:
        """The network's output for normalised images ``x``."""
        return self.model(x.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else x)

    def on_train_epoch_start(self) -> None:
        """Random numbers depend on seed, epoch and process alone, so an interrupted run repeats none."""
        torch.manual_seed(derive_seed(self.recipe.seed, self.current_epoch, self.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep with the weights what is needed to use them, as plain values."""
        checkpoint["ecanet"] = {"recipe": to_dict(self.recipe), "spec": asdict(self.spec)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run goes on with the classes that it began with."""
        check_classes(self.recipe.data.name, self.spec, DataSpec(**checkpoint["ecanet"]["spec"]))

    @property
    def effective_batch(self) -> int:
        """Images that go into one step of the optimiser, over all devices and accumulated batches.

        A set with fewer images than that gives all of them.
        """
        wanted = self.recipe.data.batch_size * self.recipe.accumulate * self.trainer.world_size
        return min(wanted, len(cast(Any, self.trainer).datamodule.train))

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, scaled to the effective batch."""
        return self.recipe.optimizer.learning_rate * self.effective_batch / self.recipe.optimizer.base_batch

    def configure_optimizers(self) -> Any:
        """SGD or AdamW over one or two groups of parameters, and a schedule by steps."""
        config = self.recipe.optimizer
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained}]
        if not config.decay_norms:
            groups = [
                {"params": [p for p in trained if p.ndim > 1]},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
        optimizer = (
            torch.optim.SGD(
                groups,
                self.learning_rate,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
            )
            if config.name == "sgd"
            else torch.optim.AdamW(groups, self.learning_rate, weight_decay=config.weight_decay)
        )
        # not trainer.estimated_stepping_batches: it starts the loader's workers before a resumed run knows its epoch
        batches = len(cast(Any, self.trainer).datamodule.train_dataloader())
        if self.recipe.accumulate > batches:
            raise ConfigError(f"accumulate={self.recipe.accumulate} batches make a step, but an epoch has {batches}")
        steps = math.ceil(batches / self.recipe.accumulate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(self.recipe.schedule, step / steps, self.recipe.epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Classification(Task):
    """One class for each image: cross-entropy or BCE; top-1 and top-5 in percent on the held-out images."""

    monitor = "top1"

    def __init__(self, recipe: Recipe, spec: DataSpec):
        if boxes.knows(recipe.data.name):
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
        self.examples: list[dict[str, Any]] = []

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

    def artifacts(self) -> dict[str, Any]:
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
                        "image": self.spec.pixels(images[at]).cpu(),
                        "label": int(labels[at]),
                        "prediction": int(predictions[at]),
                        "probability": float(logits[at].softmax(0)[predictions[at]]),
                    }
                )


def learning_rate_factor(schedule: ScheduleConfig, epoch: float, epochs: int) -> float:
    """What the peak learning rate is multiplied by after ``epoch`` epochs, a fraction counting the steps within one.

    >>> cosine = ScheduleConfig(name="cosine", warmup_epochs=2)
    >>> [round(learning_rate_factor(cosine, epoch, 10), 3) for epoch in (0.5, 2, 6, 10)]
    [0.25, 1.0, 0.5, 0.0]
    """
    if epoch < schedule.warmup_epochs:
        return epoch / schedule.warmup_epochs
    match schedule.name:
        case "cosine":
            done = (epoch - schedule.warmup_epochs) / (epochs - schedule.warmup_epochs)
            return (1 + math.cos(math.pi * min(done, 1.0))) / 2
        case "step" if schedule.milestones:
            return schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
        case "step":
            return schedule.factor ** (int(epoch) // schedule.step_epochs)
        case "exponential":
            return schedule.factor ** int(epoch)
        case "constant":
            return 1.0


class Detection(Task):
    """Boxes, and masks with Mask R-CNN, around objects; COCO's average precision, from 0 to 1, on the held-out images.

    ``AP``, ``AP50``, ``AP75``, ``APS``, ``APM`` and ``APL`` are the boxes', ``mask_AP`` and so on the masks'; -1 stands
    where no held-out object has the size.
    """

    monitor = "AP"

    def __init__(self, recipe: Recipe, spec: DataSpec):
        super().__init__(recipe, spec, tasks_detection.detector(recipe, spec))
        self.outcome: tasks_detection.Outcome | None = None

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
        self.outcome = tasks_detection.Outcome(cast(Any, self.trainer).datamodule.held_out.annotations)

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

    def artifacts(self) -> dict[str, Any]:
        """Class names, precision by recall, and examples, right and wrong."""
        found = self.outcome.artifacts() if self.outcome else {}
        return {"class_names": list(self.spec.class_names), **found}

    def files(self) -> dict[str, str]:
        """What was found on the held-out images as COCO's result files, ``bbox.json`` and ``segm.json``."""
        results = self.outcome.results if self.outcome else {}
        return {f"{kind}.json": json.dumps(entries) for kind, entries in results.items()}


TASKS: dict[str, Any] = {"classification": Classification, "detection": Detection}
