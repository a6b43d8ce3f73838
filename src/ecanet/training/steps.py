"""What a run does after each step: it saves within an epoch, obeys signals, and stops at a loss that is not finite."""

import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed.tensor import DTensor

from ecanet.errors import ConfigError
from ecanet.recipes import CheckpointConfig
from ecanet.training.stopping import StopRequest
from ecanet.training.tasks import Task, get_data
from ecanet.training.votes import Votes

__all__ = ["StepWatch"]

NAMED = 3
"""Number of images that a message names."""


class StepWatch(Checkpoint):
    """Save ``path`` every few minutes or steps, and when a signal asks the run to end.

    Lightning calls the callbacks of this kind last, after the average of the weights was updated. ``config`` says how
    often; ``request`` gets the signals. A run that was resumed goes on with the next image.

    ``stopped`` is the epoch and the batch after which the run has ended, both counted from 1, or None.
    """

    def __init__(self, path: Path, config: CheckpointConfig, request: StopRequest):
        self.path, self.config, self.request = path, config, request
        self.stopped: tuple[int, int] | None = None
        self.batches = 0
        self.wanted = False
        self.last_saved, self.last_step = time.monotonic(), 0
        self.seen: list[tuple[int, Any, bool | Tensor]] = []

    def describe(self) -> str:
        """Return by which signal, and where, the run was stopped."""
        by = f"stopped by {self.request.name or 'a signal to another process'}"
        return by if self.stopped is None else f"{by} in epoch {self.stopped[0]} after batch {self.stopped[1]}"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal lets the present step end."""
        self.votes = Votes(trainer.strategy.root_device, trainer.world_size, questions=3)
        self.last_saved, self.last_step = time.monotonic(), trainer.global_step
        # A run that was stopped in an evaluation goes on with it, and has no batch before.
        self.batches = get_data(trainer).first_batch
        self.request.training = True
        if self.request.name is not None:
            raise SIGTERMException

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal ends the run at once: there is no other step."""
        self.request.training = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """As after training."""
        self.request.training = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save and end the run if it is time, once the step's last batch is accumulated.

        Raises:
            ConfigError: the loss is not finite.
            KeyboardInterrupt: Ctrl-C was pressed where Python dropped the exception.
        """
        self._check_interrupt()
        task, self.batches = cast(Task, pl_module), batch_idx + 1
        loss = cast(dict[str, object], outputs).get("loss") if isinstance(outputs, dict) else None
        bad = ~torch.isfinite(loss) if isinstance(loss, Tensor) else False
        self.seen = [*self.seen[-1:], (self.batches, get_data(trainer).drawn, bad)]
        stop, due, broken = self.votes.put([self.request.name is not None, self._is_due(trainer), bad])
        self._check_loss(trainer, broken)
        self.wanted |= stop or due
        complete = trainer.is_last_batch or self.batches % trainer.accumulate_grad_batches == 0
        if trainer.is_last_batch or (self.wanted and complete):
            late_stop, _, broken = self.votes.flush()
            self._check_loss(trainer, broken)
            self._check_weights(trainer, task)
            stop |= late_stop
        if self.wanted and complete:
            self._save(trainer)
            self._end(trainer, stop or self.request.name is not None)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and end the run if a signal came; the resumed run evaluates again, from the first image."""
        self._check_interrupt()
        data = get_data(trainer)
        # Processes may have one batch more or less: they can only vote together while all of them have one.
        in_all = len(data.held_out) // trainer.world_size // data.config.batch_size
        if trainer.state.fn != TrainerFn.FITTING or (batch_idx >= in_all and trainer.world_size > 1):
            return
        if self.votes.put([self.request.name is not None, False, False])[0]:
            for callback in cast(list[L.Callback], cast(Any, trainer).callbacks):
                if isinstance(callback, WeightAveraging):  # during validation the average is in the network
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._save(trainer)
            self._end(trainer, True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describe the position in the epoch so that Lightning goes on with the next batch, or with validation."""
        if not get_data(trainer).position:
            return
        loops = checkpoint["loops"]["fit_loop"]
        for part in ("total", "current"):
            batches = loops["epoch_loop.batch_progress"][part]
            batches["completed"] = batches["ready"]
            if trainer.is_last_batch:
                # As if validation were in its first batch: then Lightning repeats it, and does not leave it out.
                evaluated = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
                loops["epoch_loop.val_loop.batch_progress"][part] = evaluated
        if not trainer.is_last_batch:
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1

    def _check_interrupt(self) -> None:
        if self.request.interrupted:
            raise KeyboardInterrupt

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Return whether it is time for a checkpoint; the first process alone looks at the clock."""
        minutes = (time.monotonic() - self.last_saved) / 60
        by_time = bool(self.config.minutes) and minutes >= self.config.minutes and trainer.is_global_zero
        return by_time or (self.config.steps > 0 and trainer.global_step - self.last_step >= self.config.steps)

    def _save(self, trainer: L.Trainer) -> None:
        data = get_data(trainer)
        data.position = self.batches
        try:
            trainer.save_checkpoint(self.path)
        finally:
            data.position = 0
        self.wanted = False
        self.last_saved, self.last_step = time.monotonic(), trainer.global_step

    def _end(self, trainer: L.Trainer, stop: bool) -> None:
        """End the run if a signal came to one of the processes."""
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            self.stopped = trainer.current_epoch + 1, self.batches
            raise SIGTERMException

    def _check_loss(self, trainer: L.Trainer, broken: bool) -> None:
        """Raise ConfigError if the loss of the step, on a GPU of the step before, is not finite in some process."""
        if not broken:
            return
        mine = [(batch, get_data(trainer).name_images(drawn)) for batch, drawn, bad in self.seen if bool(bad)]
        parts = [mine] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, mine)
        found = [one for part in parts for one in part]
        # After a broken batch the weights are broken too, and so are the losses of the next one in all processes.
        first = min(batch for batch, _ in found)
        names = [name for batch, part in found if batch == first for name in part]
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ConfigError(
            f"the loss is not finite in epoch {trainer.current_epoch + 1}, batch {first}: "
            f"{', '.join(names[:NAMED])}{rest}; go on from the last checkpoint with a lower rate ({self._lower()}), or "
            f"begin a run that passes such batches over (--set on_nan=skip)"
        )

    def _check_weights(self, trainer: L.Trainer, task: Task) -> None:
        """Raise ConfigError if a weight is not finite: neither a checkpoint nor an evaluation may have it."""
        weights = [parameter.detach() for parameter in task.model.parameters()]
        mine = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        broken = not bool(torch.stack([weight.isfinite().all() for weight in mine]).all())
        if trainer.world_size > 1:  # a process may have a share of the weights
            broken = trainer.strategy.reduce_boolean_decision(broken, all=False)
        if broken:
            raise ConfigError(
                f"the weights are not finite after batch {self.batches} of epoch {trainer.current_epoch + 1}, though "
                f"the loss was; go on from the last checkpoint with a lower rate: {self._lower()}"
            )

    def _lower(self) -> str:
        """Return the command that goes on with another learning rate."""
        return f"ecanet train --resume {self.path.parent.parent} --learning-rate X"
