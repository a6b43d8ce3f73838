"""The base class of every task: network, optimizer, schedule, random state, checkpoints."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NotRequired, Protocol, TypedDict, cast

import lightning as L
import torch
from torch import Tensor, nn

from ecanet.data import ClassificationData, DataSpec, DetectionData, Split, check_classes, derive_seed
from ecanet.errors import ConfigError, DataError
from ecanet.networks import Built
from ecanet.recipes import Recipe, to_dict
from ecanet.report import Artifacts
from ecanet.surgery import parameter_groups
from ecanet.training.sharding import gather, release, shard
from ecanet.training.tasks.means import RunningMeans
from ecanet.training.tasks.schedule import change_rate, learning_rate_factor

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
    resumed: tuple[int, int, int] = (0, 0, 0)
    """The whole epochs, the batches of the next one, and all steps that were done when a resumed run was stopped."""

    sample: Tensor | list[Tensor] | None = None
    """A few images of the last evaluation, as ``forward`` takes them, on which the report shows the gates."""

    rate_before: float | None = None
    """The recipe's learning rate until the run was resumed with another one."""

    def __init__(self, recipe: Recipe, spec: DataSpec, model: nn.Module):
        super().__init__()
        self.recipe, self.spec = recipe, spec
        self.notes: list[str] = []
        self.network: dict[str, object] = {}
        self.exchanged: list[str] = []
        self.unexpected: list[str] = []
        self.means = RunningMeans()
        self.model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
        if recipe.compile:
            # Compiling in place keeps the names of the parameters. Only a detector's backbone is a single graph.
            compiled: nn.Module = getattr(self.model, "backbone", self.model)
            compiled.compile()  # pyright: ignore[reportUnknownMemberType]

    def keep_story(self, built: Built) -> None:
        """Keep what was loaded, exchanged and attached when the network was built."""
        self.notes, self.network, self.exchanged = built.describe(), built.to_dict(), built.exchanged
        self.unexpected = [] if built.loaded is None else built.loaded.unexpected

    def configure_model(self) -> None:
        """Share the weights among the processes, if the recipe says so."""
        mesh = self.device_mesh
        if mesh is not None:
            shard(self.model, mesh["data_parallel"], sync_batchnorm=self.recipe.sync_batchnorm)

    def on_validation_start(self) -> None:
        """Give every process all weights: they evaluate different numbers of batches."""
        gather(self.model)

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

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch by name; "train_loss" is the one that is minimized."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Sequence[object], object], batch_idx: int) -> Tensor | None:
        """Return the loss of a batch, or `make_empty_loss` if it has no image, or its loss is to be passed over."""
        images = len(batch[0])
        if not images:
            return self.make_empty_loss()
        before = self._copy_buffers()
        losses = self.compute_losses(batch)
        loss, share = losses["train_loss"], get_data(self.trainer).weigh_share()
        if before is not None and not bool(torch.isfinite(loss)):
            self._skip(before)
            return self.make_empty_loss()
        self.means.add(losses, images if share else 0)
        return loss if share == 1 else loss * share

    def _copy_buffers(self) -> list[Tensor] | None:
        """Return copies of the network's buffers, such as a norm's statistics, if a step may have to be undone."""
        return [value.clone() for value in self.model.buffers()] if self.recipe.on_nan == "skip" else None

    def _skip(self, before: Sequence[Tensor]) -> None:
        """Name the images of the batch, and put the network's buffers back."""
        names = get_data(self.trainer).name_images(get_data(self.trainer).drawn)
        print(
            f"skipped a batch whose loss is not finite, in epoch {self.current_epoch + 1}: {', '.join(names)}",
            file=sys.stderr,
            flush=True,
        )
        for value, old in zip(self.model.buffers(), before, strict=True):
            value.copy_(old)

    def on_train_epoch_start(self) -> None:
        """Forget the losses of the epoch before; a run that goes on within an epoch keeps them."""
        self.means.reset()
        release(self.model)

    def on_validation_epoch_end(self) -> None:
        """Log the means of the epoch's losses in training, if there was any."""
        for name, value in self.means.compute().items():
            self.log(name, value)

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
            "means": self.means.state_dict(),
            "optimized": len(cast(Any, checkpoint["optimizer_states"])[0]["state"]),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Restore the means of the losses, and a learning rate that was changed.

        Raises:
            DataError: the classes of the data, or its split, have changed since the checkpoint.
        """
        content = cast(dict[str, Any], checkpoint["ecanet"])
        if self.global_rank == 0 and "means" in content:
            self.means.load_state_dict(content["means"])
        self.rate_before = change_rate(checkpoint, self.recipe.optimizer.learning_rate)
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
        first_epoch, first_batch, first_step = self.resumed
        ahead = first_epoch * steps + math.ceil(first_batch / self.recipe.accumulate) - first_step
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(schedule, (step + ahead) / steps, epochs),
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
