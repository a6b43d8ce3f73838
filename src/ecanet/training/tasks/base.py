"""The base class of every task."""

import math
from dataclasses import asdict
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor, nn

from ecanet.data import DataSpec, check_classes, derive_seed
from ecanet.errors import ConfigError
from ecanet.recipes import Recipe, to_dict
from ecanet.report import Artifacts
from ecanet.training.tasks.schedule import learning_rate_factor

__all__ = ["NOTHING_READ", "Task"]

NOTHING_READ = "not one held-out image could be read, so there is nothing to evaluate on"


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

    def artifacts(self) -> Artifacts:
        """Return what the report draws."""
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
