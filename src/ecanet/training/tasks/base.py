"""The base class of every task: network, optimizer, schedule, random state, checkpoints."""

import math
from dataclasses import asdict
from typing import ClassVar, NotRequired, Protocol, TypedDict, cast

import lightning as L
import torch
from torch import Tensor, nn

from ecanet.data import ClassificationData, DataSpec, DetectionData, Split, check_classes, derive_seed
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import Recipe, to_dict
from ecanet.report import Artifacts
from ecanet.surgery import parameter_groups
from ecanet.training.building import Built
from ecanet.training.tasks.schedule import learning_rate_factor

__all__ = ["NO_READABLE_IMAGE", "Optimization", "Task", "get_data"]

NO_READABLE_IMAGE = "not one held-out image could be read, so there is nothing to evaluate on"


class Schedule(TypedDict):
    """A learning rate schedule and the ``interval`` ("step") at which Lightning advances it."""

    scheduler: torch.optim.lr_scheduler.LRScheduler
    interval: str


class Optimization(TypedDict):
    """The result of ``configure_optimizers``, as Lightning takes it."""

    optimizer: torch.optim.Optimizer
    lr_scheduler: Schedule


class ParameterGroup(TypedDict):
    """Parameters with a learning rate or a weight decay of their own."""

    params: list[nn.Parameter]
    lr: NotRequired[float]
    weight_decay: NotRequired[float]


class _TrainerWithData(Protocol):
    datamodule: ClassificationData | DetectionData


def get_data(trainer: L.Trainer) -> ClassificationData | DetectionData:
    """Return the data module of a run's ``trainer``."""
    return cast(_TrainerWithData, trainer).datamodule


class Task(L.LightningModule):
    """The base of all tasks: a network, its optimizer and schedule, and a random state that survives a resume.

    ``notes`` are lines that say what was loaded into the network and attached to it; ``network`` has the same as plain
    values. ``exchanged`` are the tensors of a new head, ``unexpected`` the file's tensors that have no place.
    """

    monitor: ClassVar[str]
    split: Split | None = None
    """The images that the restored network was trained on, if its run has split a flat folder."""
    resumed: tuple[int, int] = (0, 0)
    """The finished epochs, and the steps in them, of the checkpoint from which a run was resumed."""

    def __init__(self, recipe: Recipe, spec: DataSpec, model: nn.Module):
        super().__init__()
        self.recipe, self.spec = recipe, spec
        self.notes: list[str] = []
        self.network: dict[str, object] = {}
        self.exchanged: list[str] = []
        self.unexpected: list[str] = []
        self.model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
        if recipe.compile:
            # Compiling in place keeps the names of the parameters. Only a detector's backbone is a single graph.
            compiled: nn.Module = getattr(self.model, "backbone", self.model)
            compiled.compile()  # pyright: ignore[reportUnknownMemberType]

    def keep_story(self, built: Built) -> None:
        """Keep what was loaded, exchanged and attached when the network was built."""
        self.notes, self.network, self.exchanged = built.describe(), built.to_dict(), built.exchanged
        self.unexpected = [] if built.loaded is None else built.loaded.unexpected

    def make_empty_loss(self) -> Tensor | None:
        """Return the loss of a batch without a readable image: None, or zero if there are several processes.

        The other processes wait for gradients from this one, so the zero depends on every parameter.
        """
        if self.trainer.world_size == 1:
            return None
        return torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum() * 0

    def artifacts(self) -> Artifacts:
        """Return the data that the report draws; `ecanet.report` lists the names it supports."""
        return {}

    def files(self) -> dict[str, str]:
        """Return the results of the last evaluation as file contents by file name, if there is a format for them."""
        return {}

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Seed the random state from the seed, the epoch, the batch and the rank.

        So a run that is resumed in the middle of an epoch draws the same numbers: for mixup and cutmix, dropout, and
        the choices of detectors. An image's own numbers do not depend on its batch: see ``ecanet.data.randomness``.
        """
        seed = derive_seed(self.recipe.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Save the recipe, the data's description and its split beside the weights, as plain values."""
        data = get_data(self.trainer)
        checkpoint["ecanet"] = {
            "recipe": to_dict(self.recipe),
            "spec": asdict(self.spec),
            "split": data.split and data.split.to_dict(),
            "batch": data.config.batch_size * self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Raise DataError if the classes of the data, or its split, have changed since the checkpoint."""
        content = cast(dict[str, dict[str, object]], checkpoint["ecanet"])
        schedules = cast(list[dict[str, int]], checkpoint["lr_schedulers"])
        self.resumed = cast(int, checkpoint["epoch"]) + 1, schedules[0]["last_epoch"]
        check_classes(self.recipe.data.name, self.spec, DataSpec.from_dict(content["spec"]))
        split = get_data(self.trainer).split
        if (split and split.to_dict()) != content.get("split"):
            raise DataError(
                f"{self.recipe.data.name}: the training and held-out images are not those of the checkpoint; restore "
                "the run's split.json and the folder's layout"
            )

    @property
    def effective_batch(self) -> int:
        """Return the number of images per optimizer step, over all devices and accumulated batches.

        At most the number of images in the data set.
        """
        data = get_data(self.trainer)
        images = data.config.batch_size * self.recipe.accumulate * self.trainer.world_size
        training = data.train
        assert training is not None
        return min(images, len(training))

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate, scaled to the effective batch."""
        return self.recipe.optimizer.learning_rate * self.effective_batch / self.recipe.optimizer.base_batch

    def configure_optimizers(self) -> Optimization:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return SGD or AdamW, and a schedule that advances at every step.

        Raises:
            ConfigError: an epoch has fewer batches than the recipe accumulates for one step.
        """
        # trainer.estimated_stepping_batches would start the loader's workers before a resumed run knows its epoch.
        batches = len(get_data(self.trainer).train_dataloader())
        if self.recipe.accumulate > batches:
            raise ConfigError(
                f"accumulate={self.recipe.accumulate} batches make a step, but an epoch has {batches}; lower accumulate"
            )
        steps = math.ceil(batches / self.recipe.accumulate)
        optimizer, epochs = self._make_optimizer(), self.recipe.epochs
        schedule = self.recipe.schedule.in_epochs(steps, epochs)
        # With another number of processes, an epoch may have had another number of steps before the checkpoint.
        first_epoch, first_step = self.resumed
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(schedule, (first_epoch * steps + step - first_step) / steps, epochs),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.recipe.optimizer
        groups = cast(list[dict[str, object]], self._group_parameters())
        if config.name == "adamw":
            return torch.optim.AdamW(groups, self.learning_rate, weight_decay=config.weight_decay)
        return torch.optim.SGD(
            groups,
            self.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )

    def _group_parameters(self) -> list[ParameterGroup]:
        """Return all trainable parameters: in one group, or apart those with another rate or weight decay.

        Gates are apart if the recipe gives them another rate; biases and norms if they have no weight decay.
        """
        config = self.recipe.optimizer
        groups: list[ParameterGroup] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if config.gate_rate != 1:
            rates = {"lr": self.learning_rate, "gate_lr": self.learning_rate * config.gate_rate}
            groups = cast(list[ParameterGroup], parameter_groups(self.model, **rates))
        if config.decay_norms:
            return groups
        network, *gates = groups
        shaped, flat = ([p for p in network["params"] if (p.ndim > 1) == wanted] for wanted in (True, False))
        return [{**network, "params": shaped}, {**network, "params": flat, "weight_decay": 0.0}, *gates]
